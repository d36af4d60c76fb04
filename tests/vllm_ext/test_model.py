"""vLLM's own model around packed experts, without an engine: what its builds for GPUs run without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_support import ENVIRONMENT, needs_vllm, pack_small, small_model

pytestmark = [needs_vllm, pytest.mark.filterwarnings("ignore:.*calibration token")]

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {"layer_types": ["full_attention"] * 2},
    "mixtral": {},
}
RELATIVE = 1e-5
"""In float32; both run the same kernels for the experts, but add shared ones and router in another order."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Family -> its packed checkpoint, and what ``vllm_model.py`` makes of it."""
    folder = tmp_path_factory.mktemp("model")
    packed = [pack_small(small_model(f, **changes), folder / f) for f, changes in FAMILIES.items()]
    (folder / "jobs.json").write_text(json.dumps([str(path) for path in packed]))
    script = Path(__file__).parents[1] / "support" / "vllm_model.py"
    command = [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "results.pt")]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    results = torch.load(folder / "results.pt")
    return {family: (packed[i], results[i]) for i, family in enumerate(FAMILIES)}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_compute_what_they_do_in_transformers(family: str, served) -> None:
    """From config.json to the output of router and experts, by vLLM's model and loader; the same compiled by
    torch, and after vLLM processed the weights a second time."""
    directory, found = served[family]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layers = [name for name in found if name != "ipc"]
    assert len(layers) == model.config.num_hidden_layers
    for name in layers:
        x, output = found[name]
        with torch.no_grad():
            wanted = model.model.layers[int(name.split(".")[2])].mlp(x[None])
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        assert float((output - wanted[0]).norm() / wanted.norm()) < RELATIVE, name


def test_the_weight_cache_refuses_packed_experts(served) -> None:
    """Made on the meta device, as its loader makes a model; it would hand out tensors whose sizes are those
    of places that are not filled."""
    for _, found in served.values():
        assert "BitsMoEMethod does not support loading from pre-processed weights" in found["ipc"]
