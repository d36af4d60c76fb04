"""Converted checkpoints of the method authors in vLLM, and vLLM's own packing of Marlin weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from upstream_support import encode_marlin, random_upstream_layer, write_upstream
from vllm_support import TOLERANCE, compare, needs_vllm, run_vllm, small_model

from bitsmoe_plugin.commands.import_upstream.convert import import_upstream

pytestmark = needs_vllm

PROMPTS = [[5, 6, 7, 11, 13, 60, 61, 62, 3, 9], [17, 30, 2], [44, 45] * 20]
DEGREES = {
    "one": {},
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}


@pytest.mark.parametrize(("k", "n"), [(128, 64), (256, 192), (2048, 128)])
def test_our_writer_packs_marlin_weights_as_vllm_does(k: int, n: int) -> None:
    """The authors' 8-bit bases are in this layout; judges the writer that the converter is tested with."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import (
        get_weight_perm,
        marlin_weights,
    )

    codes = torch.randint(256, (k, n), dtype=torch.uint8)
    scales = torch.rand(k // 128, n).half()
    words, stored = encode_marlin(codes, scales)
    assert torch.equal(words, marlin_weights(codes.int(), k, n, 8, get_weight_perm(8)))
    assert torch.equal(stored, marlin_permute_scales(scales, k, n, 128))


def build(folder: Path, seed: int, sizes: dict[str, int], **options: Any) -> Path:
    """A converted Qwen3-MoE checkpoint of random rows."""
    model = small_model("qwen3_moe", **sizes)
    rng, hidden = random.Random(seed), sizes.get("hidden_size", 64)
    ranks = options.pop("ranks", (hidden, hidden - 5, hidden))
    layers = {
        f"model.layers.{i}.mlp": random_upstream_layer(
            rng, 4, hidden, sizes["moe_intermediate_size"], ranks, **options
        )
        for i in range(2)
    }
    import_upstream(write_upstream(folder / f"upstream-{seed}", model, layers), folder / f"out-{seed}")
    return folder / f"out-{seed}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiles per row, so that two processes can share them; an unpacked expert in each layer."""
    torch.manual_seed(0)
    return build(tmp_path_factory.mktemp("upstream"), 0, {"moe_intermediate_size": 256}, dense=(1,))


@pytest.fixture(scope="module")
def results(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    jobs = [
        {"model": str(checkpoint), "prompts": PROMPTS, "max_tokens": 8, "options": options}
        for options in DEGREES.values()
    ]
    return dict(zip(DEGREES, run_vllm(jobs, tmp_path_factory.mktemp("jobs")), strict=True))


@pytest.mark.parametrize("degree", DEGREES)
def test_vllm_agrees_with_transformers(degree: str, checkpoint: Path, results) -> None:
    """The unpacked expert is computed in float16, whose sums two processes add up otherwise: 2e-2."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for sequence in results[degree]["sequences"]:
        difference, behind = compare(model, sequence)
        assert difference < (2e-2 if degree == "tensor" else TOLERANCE)
        assert behind < (2e-2 if degree == "tensor" else TOLERANCE)


def test_eight_bit_bases_are_served(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64}
    path = build(tmp_path, 1, sizes, ranks=(128, 64, 128), basis_bits=8, widths=(0, 1, 2, 3))
    (result,) = run_vllm([{"model": str(path), "prompts": PROMPTS, "max_tokens": 4}], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    for sequence in result["sequences"]:
        assert max(compare(model, sequence)) < TOLERANCE


def test_tiles_that_two_processes_cannot_share_stop_vllm(tmp_path: Path) -> None:
    """192 neurons are six blocks, but one and a half tiles."""
    path = build(tmp_path, 2, {"moe_intermediate_size": 192})
    job = {"model": str(path), "prompts": PROMPTS, "max_tokens": 1, "options": DEGREES["tensor"]}
    with pytest.raises(RuntimeError) as error:
        run_vllm([job], tmp_path)
    for part in ("intermediate_size 192", "tensor_parallel_size 2", "2*128", "Use 1, or"):
        assert part in str(error.value)
