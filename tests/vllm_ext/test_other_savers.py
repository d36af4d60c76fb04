"""vLLM reads tensors by the names that save_pretrained gives; of a packed model it notices no missing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_support import needs_vllm

from bitsmoe_plugin import BitsMoEConfig, CheckpointError

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its router has another name in files than in the model."""
    path = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral").save_pretrained(path / "dense")
    tokens = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    config = BitsMoEConfig(bits=8, method="paper-v2", basis_bits=4, basis_group_size=16, sequence_length=16)
    config.dataset = tokens.tolist()
    return AutoModelForCausalLM.from_pretrained(path / "dense", quantization_config=config)


def _check(directory: Path) -> None:
    from vllm_ext.config import BitsMoEServingConfig

    entries = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = BitsMoEServingConfig.from_config(entries)
    config.maybe_update_config(str(directory), AutoConfig.from_pretrained(directory))


def test_names_that_vllm_does_not_know_are_refused(model: Any, tmp_path: Path) -> None:
    """Guards against a router, or a whole model, that is whatever memory held."""
    model.save_pretrained(tmp_path / "as usual", max_shard_size="30KB")
    _check(tmp_path / "as usual")
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    model.model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"names that save_pretrained gives.*save it with"):
        _check(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"MixtralModel, which has no language model head; give"):
        _check(tmp_path / "base")
