"""Codes that are learnt: values move, and are coded again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.commands.bench.synthetic import random_layer
from bitsmoe_plugin.pipeline import tunable_layer
from bitsmoe_plugin.pipeline.tunable_codes import TunableCodes
from bitsmoe_plugin.pipeline.tunable_layer import TunableLayer
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

WIDTHS, SHARES = (0, 1, 2, 3, 4, 6, 8, 16), (0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def layer_of(grid: str, intermediate_size: int = 48, seed: int = 0) -> ReferenceLayer:
    """Rows of every width; blocks are whole or, of 48 values, not."""
    shape = layout.LayerShape(4, 64, intermediate_size)
    spec, packed = random_layer(shape, widths=WIDTHS, shares=SHARES, grid=grid, seed=seed)
    return ReferenceLayer.prepare(spec, packed, silu)


def routed(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tokens, 4, generator=generator).topk(2).indices
    return torch.randn(tokens, 64, generator=generator), index, torch.full((tokens, 2), 0.5)


@pytest.mark.parametrize("grid", ["trellis", "uniform"])
@pytest.mark.parametrize("size", [48, 64])
def test_codes_that_have_not_moved_are_those_that_are_stored(grid: str, size: int) -> None:
    """To the bit, at every width: guards a search that finds others at no cost."""
    layer = layer_of(grid, size)
    codes, inputs = TunableCodes(layer), routed()
    assert torch.equal(codes.payload(), layer.packed.payload)
    bases, stored = layer.bases(), layer.forward(*inputs)
    given = layer.compute(*inputs, *bases, rows=codes.rows(codes.gain))
    torch.testing.assert_close(given.detach(), stored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", ["trellis", "uniform"])
def test_what_is_computed_with_is_what_will_be_stored(grid: str) -> None:
    """And no block's codes are farther from where its values are than those that it had."""
    layer = layer_of(grid)
    codes, inputs = TunableCodes(layer), routed()
    with torch.no_grad():
        codes.gain.copy_(0.5 * torch.randn(codes.gain.shape, generator=torch.Generator().manual_seed(2)))
        rows = codes.rows(codes.gain)
        found = layer.compute(*inputs, *layer.bases(), rows=rows)
    payload = codes.payload()
    assert payload.shape == layer.packed.payload.shape
    assert float((payload != layer.packed.payload).float().mean()) > 0.2
    packed = replace(layer.packed, payload=payload)
    again = ReferenceLayer.prepare(layer.spec, packed, silu).forward(*inputs)
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-4)
    used = layout.row_widths(packed.row_codes, WIDTHS) > 0
    left = (codes._before + codes.gain - rows)[used].detach()
    for first in range(0, 48, 32):
        block = slice(first, first + 32)
        moved = codes.gain.detach()[used][:, block].square().sum(-1)
        assert bool((left[:, block].square().sum(-1) <= moved * (1 + 1e-5)).all())
    assert float(left.square().sum() / codes.gain.detach()[used].square().sum()) < 0.9


def test_gradients_are_those_of_the_values_that_codes_stand_for() -> None:
    """As if values were not coded; rows of width 0 have none."""
    layer, inputs = layer_of("trellis"), routed()
    codes, bases = TunableCodes(layer), layer.bases()
    layer.compute(*inputs, *bases, rows=codes.rows(codes.gain)).double().square().sum().backward()
    plain = codes._before.clone().requires_grad_(True)
    layer.compute(*inputs, *bases, rows=plain).double().square().sum().backward()
    used = layout.row_widths(layer.packed.row_codes, WIDTHS) > 0
    torch.testing.assert_close(codes.gain.grad[used], plain.grad[used])
    assert float(codes.gain.grad[~used].abs().max()) == 0 < float(plain.grad[~used].abs().max())
    assert float(codes.gain.grad[used].abs().max()) > 0


def test_codes_follow_from_gains_alone(packed: Any) -> None:
    """Not from those before: else neither the best epoch's nor an interrupted run's would come back."""
    module = copy.deepcopy(packed.get_submodule("model.layers.0.mlp.experts"))
    layer = TunableLayer(module, learn=("codes",))
    (gain,) = layer.gains
    generator = torch.Generator().manual_seed(3)
    first, second = (0.4 * torch.randn(gain.shape, generator=generator) for _ in range(2))
    found = []
    for value in (first, second, first):
        with torch.no_grad():
            gain.copy_(value)
        found.append(layer.tuned().payload)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("narrow", [True, False])
def test_gradients_of_bfloat16_are_close_to_those_of_float32(
    packed: Any, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether products are in bfloat16 or not; one expert has no tokens. Guards against sums over experts in
    bfloat16, and against rows that get another's gradient."""
    monkeypatch.setattr(tunable_layer, "multiplies_bfloat16", lambda device: narrow)
    module = packed.get_submodule("model.layers.0.mlp.experts")
    shape, generator = module.spec.shape, torch.Generator().manual_seed(4)
    index = torch.rand(60, shape.num_experts - 1, generator=generator).topk(2).indices
    hidden = torch.randn(60, shape.hidden_size, generator=generator)
    direction = torch.randn(60, shape.hidden_size, generator=generator)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = TunableLayer(module, learn=("bases", "rows", "codes"))
        given = hidden.to(torch.bfloat16).to(dtype).requires_grad_()
        out = layer.forward(given, index, torch.full((60, 2), 0.5, dtype=dtype))
        assert out.dtype == dtype
        (out.float() * direction).sum().backward()
        found.append([out.detach(), given.grad, *(gain.grad for gain in layer.gains)])
    for exact, close in zip(*found, strict=True):
        assert float((exact - close.float()).norm()) <= 0.02 * float(exact.norm())
    assert not bool(found[1][-1][:, -1].any())
