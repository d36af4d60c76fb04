"""Packed checkpoints that others wrote, on their way into vLLM: the cases of checkpoint/test_untrusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from untrusted_cases import CASES
from vllm_support import needs_vllm

from bitsmoe_plugin.codec.sharding import whole
from bitsmoe_plugin.errors import BitsMoEError

pytestmark = needs_vllm


def _load(directory: Path) -> None:
    """What vLLM does with a directory before it makes a model, and then layer by layer."""
    from vllm_ext.config import BitsMoEServingConfig
    from vllm_ext.weight_loading import load_shard

    entries = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = BitsMoEServingConfig.from_config(entries)
    config.maybe_update_config(str(directory), AutoConfig.from_pretrained(directory))
    for name, spec in config.files.specs.items():
        load_shard(config.files, name, whole(spec.shape), torch.device("cpu"))


def test_the_sound_checkpoint_is_accepted(sound: Path) -> None:
    _load(sound)


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case: str, copy: Path) -> None:
    """Code of its own is refused by transformers, which vLLM asks for config.json."""
    change, message = CASES[case]
    change(copy)
    own = case == "code of its own"
    with pytest.raises(ValueError if own else BitsMoEError, match=None if own else message):
        _load(copy)


def test_a_model_far_larger_than_its_files_is_refused(copy: Path) -> None:
    """vLLM makes tensors in the sizes that config.json asks for before it reads one: here 1 GB."""
    values = json.loads((copy / "config.json").read_text())
    values["vocab_size"] = 2**23
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(BitsMoEError, match=r"weight is \(64, 32\) in the checkpoint"):
        _load(copy)
