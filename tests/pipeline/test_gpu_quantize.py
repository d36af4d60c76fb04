"""Quantization on a GPU against the same on the CPU.

    TRITON_INTERPRET=0 pytest tests/pipeline/test_gpu_quantize.py tests/codec/test_gpu_backend.py

Products are rounded otherwise there, so widths of rows that are nearly worth another differ, and what
follows from them; sizes do not, and errors hardly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline import quantize
from bitsmoe_plugin.pipeline.layer_plan import plan_layer
from bitsmoe_plugin.rounding.layer_rounding import round_layer
from bitsmoe_plugin.spectral.layer_feedback import rank_feedback
from bitsmoe_plugin.spectral.layer_problem import build_problem

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "0", reason="TRITON_INTERPRET=0 compiles kernels"),
]

TOKENS = torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1))
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"method": "fast"},
    "paper-v1": {"method": "paper-v1"},
    "uniform": {"grid": "uniform", "joint_basis": False},
}
methods = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())


def relative_error(value: Tensor, wanted: Tensor) -> float:
    return float((value.cpu().double() - wanted.cpu().double()).norm() / wanted.cpu().double().norm())


def on_gpu(activations: LayerActivations) -> LayerActivations:
    return LayerActivations(*(tensor.cuda() for tensor in vars(activations).values()))


@methods
def test_parts_of_a_layer_agree(options: dict[str, Any], make_layer: Callable[..., Any]) -> None:
    """Statistics, bases' span, feedback, costs, and the error of rounding at the same widths."""
    layer = make_layer(8, 96, 64, 1500)
    config = BitsMoEConfig(bits=2.5, basis_group_size=32, **options)
    own, there = (
        build_problem("layer", layer.weights, activations, layer.gating, config)
        for activations in (layer.activations, on_gpu(layer.activations))
    )
    for name in ("second_moment", "neuron_weights", "slot_weights", "output_peaks"):
        assert relative_error(getattr(there.statistics, name), getattr(own.statistics, name)) < 1e-4, name
    assert relative_error(there.hidden_moments.variance, own.hidden_moments.variance) < 1e-4
    # The same bases from here on: those of eigenvalues that are nearly the same may be turned.
    plan = plan_layer(own, 8 * 3 * 64 * 96 * 2)
    bits = torch.randint(0, 5, (3, 8, 64), generator=torch.Generator().manual_seed(0))
    own, there = (
        build_problem("layer", layer.weights, activations, layer.gating, config, plan.bases)
        for activations in (layer.activations, on_gpu(layer.activations))
    )
    assert there.device.type == "cuda"
    assert relative_error(there.z, own.z) < 1e-4
    variances = [rank_feedback(problem, 3).variance for problem in (there, own)]
    assert relative_error(*variances) < 1e-3
    found, wanted = (round_layer(problem, bits) for problem in (there, own))
    assert all(tensor.device.type == "cpu" for _, tensor in found.packed.tensors())
    assert relative_error(found.errors, wanted.errors) < 0.01
    same = (found.packed.payload == wanted.packed.payload).float().mean()
    assert same > 0.5, f"only {float(same):.0%} of the words"


@methods
def test_a_tiny_model_is_quantized_alike(options: dict[str, Any], tiny_model: Callable[..., Any]) -> None:
    """Counted bits are equal, errors of the layers nearly, and the model computes."""
    reports = []
    for device in ("cpu", "cuda"):
        model = tiny_model("qwen3_moe").to(device)
        config = BitsMoEConfig(bits=12.0, sequence_length=32, basis_group_size=16, **options)
        done = quantize.quantize_model(model, TOKENS, config)
        assert all(t.device.type == device for t in [*model.parameters(), *model.buffers()])
        assert bool(torch.isfinite(model(TOKENS[:2].to(device)).logits).all())
        reports.append({name: entry["report"] for name, entry in done.layers.items()})
    for name, wanted in reports[0].items():
        found = reports[1][name]
        assert found["tokens_per_expert"] == wanted["tokens_per_expert"]
        assert found["calibration_error"] == pytest.approx(wanted["calibration_error"], rel=0.05)


@pytest.mark.parametrize("method", ["default", "fast"])
def test_the_bundled_model(method: str, moe_tiny_path: Path, tmp_path: Path) -> None:
    """Streamed from its files to the GPU, saved, and loaded on the CPU: perplexity as from the CPU."""
    from bitsmoe_plugin.commands.evaluate import evaluate_path

    data = moe_tiny_path.parent / "data"
    config = BitsMoEConfig(
        bits=2.0, method=method, dataset=str(data / "calibration.jsonl"), calibration_tokens=8192
    )
    perplexities, bits = [], []
    for device in ("cpu", "cuda:0"):
        out = tmp_path / str(len(bits))
        quantize_to_directory(str(moe_tiny_path), out, config, device)
        found = evaluate_path(str(out), str(data / "eval.jsonl"), max_tokens=8192)
        perplexities.append(found.perplexity)
        bits.append(inspect_checkpoint(out)["bits_per_weight"])
    assert bits[1] == pytest.approx(bits[0], abs=1e-3)
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.01)


def test_a_run_is_continued_on_the_gpu(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Stopped after the first rounded layer: plans, bases and hidden states go back to the GPU."""
    options: dict[str, Any] = {"bits": 4.0, "sequence_length": 32, "basis_group_size": 16}
    whole = quantize.quantize_model(tiny_model("qwen3_moe").cuda(), TOKENS, BitsMoEConfig(**options))
    options["work_dir"] = str(tmp_path / "work")

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        finish = quantize.ProgressOnDisk.finish_layer
        patch.setattr(quantize.ProgressOnDisk, "finish_layer", lambda *a: (finish(*a), stop()))
        with pytest.raises(Stop):
            quantize.quantize_model(tiny_model("qwen3_moe").cuda(), TOKENS, BitsMoEConfig(**options))
    again = quantize.quantize_model(tiny_model("qwen3_moe").cuda(), TOKENS, BitsMoEConfig(**options))
    for name, entry in whole.layers.items():
        found = again.layers[name]["report"]["calibration_error"]
        assert found == pytest.approx(entry["report"]["calibration_error"], rel=1e-3)
