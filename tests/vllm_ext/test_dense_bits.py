"""Linear layers outside the experts in 8 or 4 bits, served by vLLM's own kernels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_support import ALTERED, REFUSED
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_support import TOLERANCE, compare, needs_vllm, run_vllm, small_model

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError

pytestmark = [needs_vllm, pytest.mark.filterwarnings("ignore:.*calibration token")]
PROMPTS = [[5, 6, 7, 11, 13, 60, 61, 62, 3, 9], [17, 30, 2], [44, 45] * 20]
IN_FLOAT16 = 5e-3
"""In log-probabilities; measured 0.003 on the bundled model, with inputs of all layers in float16."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with shared experts and a head of its own."""
    folder = tmp_path_factory.mktemp("dense")
    model = small_model("qwen2_moe", layer_types=["full_attention"] * 2, tie_word_embeddings=False)
    model.save_pretrained(folder / "plain")
    tokens = torch.randint(2, 96, (16, 32), generator=torch.Generator().manual_seed(1)).tolist()
    for name, bits in {"8": {"lm_head": 8, "*": 8}, "4": {"o_proj": 8, "*": 4}}.items():
        config = BitsMoEConfig(
            bits=4, dataset=tokens, sequence_length=32, method="fast", dense_bits=bits, dense_group_size=32
        )
        loaded = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config)
        loaded.save_pretrained(folder / name)
    return {name: folder / name for name in ("8", "4")}


def test_served_as_in_transformers_alone_and_in_parallel(packed: dict[str, Path], tmp_path: Path) -> None:
    """Guards against layers that are read as others, or whose groups are cut in the wrong places."""
    in_parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    options: list[tuple[str, dict[str, Any]]] = [
        ("8", in_parallel),
        ("8", {"tensor_parallel_size": 2}),
        ("4", {"tensor_parallel_size": 2, "dtype": "float16"}),
        ("4", {"dtype": "float16"}),
    ]
    jobs: list[dict[str, Any]] = [
        {"model": str(packed[name]), "prompts": PROMPTS, "max_tokens": 8, "options": given}
        for name, given in options
    ]
    jobs.append({**jobs[-1], "options": {}, "refused": True})
    *results, refused = run_vllm(jobs, tmp_path)
    for (name, given), result in zip(options, results, strict=True):
        model = AutoModelForCausalLM.from_pretrained(packed[name], dtype=torch.float32)
        limit = IN_FLOAT16 if "dtype" in given else TOLERANCE
        for sequence in result["sequences"]:
            off, behind = compare(model, sequence)
            assert off < limit, (name, given)
            assert behind < limit, (name, given)
    assert "--dtype bfloat16" in refused["error"]


@pytest.fixture(scope="module")
def bundled(moe_tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("altered")
    text = str(moe_tiny_path.parent / "data" / "calibration.jsonl")
    bits = {"o_proj": 8, "*": 4}
    config = BitsMoEConfig(
        dataset=text, method="fast", dense_bits=bits, calibration_tokens=1024, sequence_length=256
    )
    model = AutoModelForCausalLM.from_pretrained(moe_tiny_path, quantization_config=config)
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("kind", ALTERED)
def test_altered_layers_are_refused_before_an_engine_starts(kind: str, bundled: Path, tmp_path: Path) -> None:
    """Guards against tensors that vLLM would take without a look."""
    from vllm_ext.config import BitsMoEServingConfig

    altered = shutil.copytree(bundled, tmp_path / "altered")
    ALTERED[kind](altered)
    entry = json.loads((altered / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match=REFUSED):
        BitsMoEServingConfig.from_config(entry).maybe_update_config(
            str(altered), AutoConfig.from_pretrained(altered)
        )
