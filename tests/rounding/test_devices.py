"""A layer is quantized on the device of its inputs: on a pretended one, nothing of the CPU gets between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from pretended_device import pretended_device

from bitsmoe_plugin.allocation import row_costs
from bitsmoe_plugin.base.devices import choose_device
from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.calibration.super_experts import forms_massive_activations
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.pipeline.layer_plan import LayerPlan, plan_layer
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.rounding.layer_rounding import round_layer
from bitsmoe_plugin.rounding.round_from_plan import round_as_planned
from bitsmoe_plugin.rounding.rounded_layer import RoundedLayer
from bitsmoe_plugin.spectral.layer_problem import build_problem

EXPERTS, SIZE, HIDDEN, TOKENS = 2, 8, 16, 80


def quantize(
    layer: Any, activations: LayerActivations, config: BitsMoEConfig
) -> tuple[LayerPlan, RoundedLayer]:
    """Both passes over a layer; all but the activations is on the CPU."""
    generator = torch.Generator().manual_seed(0)
    first = build_problem("layer", layer.weights, activations, layer.gating, config)
    plan = plan_layer(first, 3 * EXPERTS * HIDDEN * 32 * 2)
    choice = torch.randint(len(ALL_WIDTHS), (3, EXPERTS, HIDDEN), generator=generator, device="cpu")
    bits = torch.tensor(ALL_WIDTHS, device="cpu")[choice]
    if plan.row_weights is not None:
        known, device = plan.row_weights, activations.hidden.device
        return plan, round_as_planned(
            layer.weights, bits, plan.bases, plan.energies, known, config, device=device
        )
    drift = torch.randn(TOKENS, HIDDEN, generator=generator, device="cpu") if config.compensation else None
    second = build_problem("layer", layer.weights, activations, layer.gating, config, plan.bases, drift)
    return plan, round_layer(second, bits)


@pytest.mark.usefixtures("float_products")
@pytest.mark.parametrize(
    ("options", "triton"),
    [
        ({}, False),
        ({"grid": "uniform", "joint_basis": False}, True),
        ({"method": "paper-v1"}, False),
        pytest.param({"method": "fast", "grid": "uniform"}, True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_layer_is_quantized_on_the_device_of_its_inputs(
    options: dict[str, Any], triton: bool, make_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of the CPU, on the CPU, with the GPU's kernels and without."""
    layer = make_layer(EXPERTS, SIZE, HIDDEN, TOKENS)
    for cost in row_costs._NEURONS:
        monkeypatch.setitem(row_costs._NEURONS, cost, SIZE - 1)
    config = BitsMoEConfig(bits=3.0, basis_group_size=16, **options)
    plan, rounded = quantize(layer, layer.activations, config)
    with pretended_device(monkeypatch, triton) as device:
        there = LayerActivations(*(tensor.to(device) for tensor in vars(layer.activations).values()))
        found_plan, found = quantize(layer, there, config)
    assert torch.allclose(found_plan.costs, plan.costs, rtol=1e-3)
    assert torch.allclose(found.errors, rounded.errors, rtol=0.01)
    for (name, tensor), (_, wanted) in zip(found.packed.tensors(), rounded.packed.tensors(), strict=True):
        assert type(tensor) is torch.Tensor, name
        assert tensor.shape == wanted.shape, name
        # The CPU searches in integers, others in float32: codes of like cost may differ.
        assert (tensor != wanted).sum() <= 0.1 * wanted.numel(), name


def test_super_experts_are_found_where_a_layer_moves_to_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Models that are spread over devices: a layer's inputs are on the device of the one before it."""
    before = torch.ones(1, 4, 8)
    after = before.clone()
    after[0, 1, 3] = 5000.0
    with pretended_device(monkeypatch, False) as device:
        assert forms_massive_activations([before], [after.to(device)])
        assert forms_massive_activations([before.to(device)], [after])


def test_the_cpu_is_what_it_was_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--device auto`` must not ask for a GPU that is not there, and says so of one that is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"cuda:0: torch .* finds no such device"):
        choose_device("cuda:0")
    with pytest.raises(ConfigError, match="--device gpu: use auto, cpu"):
        choose_device("gpu")


def test_every_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun numbers them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == "cuda:1"
    assert choose_device("cuda:0") == "cuda:0"
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        choose_device("cuda:2")
