"""Two processes on the CPU: tensor parallel, and expert parallel with tensor parallel attention.

vLLM 0.32 has no data parallel MoE on a CPU (its communicator lacks all_gatherv), so expert parallelism
comes with tensor parallel attention; that the experts' shards themselves add up is in test_sharding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from vllm_support import TOLERANCE, compare, needs_vllm, pack_small, run_vllm, small_model

pytestmark = [needs_vllm, pytest.mark.filterwarnings("ignore:.*calibration token")]

DEGREES = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
PROMPTS = [[5, 6, 7, 11, 13, 60, 61, 62, 3, 9], [17, 30, 2], [44, 45] * 20]


@pytest.fixture(scope="module")
def results(packed_moe_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    jobs = [
        {"model": str(packed_moe_tiny), "prompts": PROMPTS, "max_tokens": 12, "options": options}
        for options in DEGREES.values()
    ]
    return dict(zip(DEGREES, run_vllm(jobs, tmp_path_factory.mktemp("parallel")), strict=True))


@pytest.mark.parametrize("degree", DEGREES)
def test_two_processes_agree_with_transformers(degree: str, packed_moe_tiny: Path, results) -> None:
    """Guards shards that overlap, that are missing, or that are added twice."""
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype="float32")
    for sequence in results[degree]["sequences"]:
        difference, behind = compare(model, sequence)
        assert difference < TOLERANCE
        assert behind < TOLERANCE


def test_rows_that_two_processes_cannot_share_stop_vllm(tmp_path: Path) -> None:
    """96 neurons are three blocks. vLLM alone would give 48 to each process."""
    model = pack_small(small_model("qwen3_moe", moe_intermediate_size=96), tmp_path)
    job = {"model": str(model), "prompts": PROMPTS, "max_tokens": 1, "options": DEGREES["tensor"]}
    with pytest.raises(RuntimeError) as error:
        run_vllm([job], tmp_path)
    for part in (
        "model.layers.0.mlp.experts",
        "intermediate_size 96",
        "tensor_parallel_size 2",
        "Use 1, 3, or",
    ):
        assert part in str(error.value)
