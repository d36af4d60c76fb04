"""Packed models that transformers spreads over processes: the same outputs as in one, or a refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families_support import build, quantize
from safetensors.torch import load_file

PROGRAM = Path(__file__).parents[1] / "support" / "parallel_support.py"
ROUNDING = 1e-4
"""Relative. The kernels round inputs to 16 bits in places that differ between a layer and its parts."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes of ``outcomes`` saved together."""
    return tmp_path_factory.mktemp("parallel") / "saved"


@pytest.fixture(scope="module")
def outcomes(
    packed_moe_tiny: Path, moe_tiny_path: Path, tiny_model: Any, saved: Path, tmp_path_factory
) -> dict[str, Any]:
    """What came out in two processes."""
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, int]] = {"gpt_oss": {}, "qwen3_moe": {"num_local_experts": 3}}
    for family, changes in kinds.items():
        build(tiny_model, family, **changes).save_pretrained(folder / family)
        quantize(folder / family).save_pretrained(folder / f"{family}-packed")
    models = [packed_moe_tiny, moe_tiny_path, folder / "gpt_oss-packed", folder / "qwen3_moe-packed", saved]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(PROGRAM), *map(str, models)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("OUTCOMES ")]
    return json.loads(line.removeprefix("OUTCOMES "))  # type: ignore[no-any-return]


def payload_words(directory: Path) -> int:
    tensors = load_file(directory / "model.safetensors")
    return sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("bitsmoe_payload"))


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("kind", ["tensor", "expert", "pipeline", "data", "replicated"])
def test_outputs_are_those_of_one_process(outcomes: dict[str, Any], kind: str) -> None:
    """Guards against an output that is summed twice, or not at all."""
    assert outcomes[kind] < ROUNDING


def test_each_process_holds_its_part(outcomes: dict[str, Any], packed_moe_tiny: Path) -> None:
    whole = payload_words(packed_moe_tiny)
    assert outcomes["tensor words"] == whole // 2
    assert 0 < outcomes["expert words"] < whole
    assert outcomes["data words"] == whole
    assert outcomes["tensor parameters"] == outcomes["expert parameters"] == 0


@pytest.mark.parametrize("kind", ["tensor", "expert"])
def test_gradients_are_those_of_one_process(outcomes: dict[str, Any], kind: str) -> None:
    """Of the router and of what comes before the experts, of which each process has a part."""
    assert outcomes[f"{kind} gradients"] < 10 * ROUNDING


@pytest.mark.parametrize("kind", ["tensor", "expert"])
def test_biases_are_added_once(outcomes: dict[str, Any], kind: str) -> None:
    """GPT-OSS, whose plan for tensor parallelism leaves experts whole."""
    assert outcomes[f"{kind} biased"] < ROUNDING


def test_what_tensor_parallel_processes_save_is_whole(
    outcomes: dict[str, Any], saved: Path, packed_moe_tiny: Path
) -> None:
    """Packed tensors bitwise; the others were loaded in float32."""
    first, second = (load_file(folder / "model.safetensors") for folder in (packed_moe_tiny, saved))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor.float(), second[name].float()) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("rows", "intermediate_size 16 cannot be split over tensor_parallel_size 2"),
        ("experts", "3 experts cannot be split over ep_size 2"),
        ("plan", "tp_plan names model.layers.*.mlp.experts"),
        ("quantize", "not quantized while distributed_config or tp_plan splits it"),
        ("dequantize", "model.layers.0.mlp.experts is split over processes"),
        ("pipeline saved", "save_pretrained: with pp_size=2, parts of a packed model"),
        ("data saved", "save_pretrained: with fsdp_size=2, parts of a packed model"),
    ],
)
def test_what_cannot_be_is_refused(outcomes: dict[str, Any], attempt: str, message: str) -> None:
    assert outcomes[attempt].startswith("ConfigError: ")
    assert message in outcomes[attempt]
