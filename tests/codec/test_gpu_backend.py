"""Kernels that round, choose scales and pack, against plain torch: in Triton's interpreter, or on a GPU.

    TRITON_INTERPRET=0 pytest tests/codec/test_gpu_backend.py

Sums of up to 100 float32 values are taken in another order: a choice between nearly equal codes may differ.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout, row_codec, scale_grid
from bitsmoe_plugin.codec.backends.gpu import TRITON
from bitsmoe_plugin.codec.backends.reference import REFERENCE
from bitsmoe_plugin.codec.scale_grid import ScaleGrid
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.rounding import feedback_rounding
from bitsmoe_plugin.spectral.error_feedback import Feedback

pytest.importorskip("triton", reason="Triton is published for Linux only")

COMPILED = torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"
DEVICE = "cuda" if COMPILED else "cpu"
SAME = 0.97
"""Share of codes that must be the same."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def check_rows(rows: Tensor, scales: Tensor, weights: Tensor, bits: Tensor, grid: str) -> None:
    """Codes cost what those of plain torch do and are mostly the same; values are what they stand for."""
    found, values = (t.cpu() for t in TRITON.rounded(*moved(rows, scales, weights, bits), grid))
    wanted, decoded = REFERENCE.rounded(rows, scales, weights, bits, grid)
    assert found.shape == wanted.shape
    assert (found == wanted).float().mean() > SAME
    assert torch.allclose(
        values, row_codec.decode(found, scales, bits, rows.shape[-1], grid), rtol=1e-6, atol=0
    )
    error, least = (((v - rows).double().square() * weights).sum(-1) for v in (values, decoded))
    assert bool((error <= least * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize(("grid", "size"), [("trellis", 32), ("trellis", 100), ("uniform", 40)])
def test_rows_of_all_widths_in_one_launch(grid: str, size: int) -> None:
    """Tails of 4 and 8 columns; values that weigh nothing."""
    bits = torch.tensor(ALL_WIDTHS)
    weights = normal(len(bits), size, seed=1).abs()
    weights[:, 3:9] = 0
    check_rows(normal(len(bits), size), torch.linspace(0.6, 1.4, len(bits)), weights, bits, grid)


def test_rows_of_extreme_size() -> None:
    """Rows of zeros, rows and scales far from 1, and rows without any weight."""
    rows = torch.cat([torch.zeros(1, 40), 1e-20 * normal(1, 40), 1e15 * normal(1, 40), normal(1, 40)])
    weights = torch.ones(4, 40)
    weights[3] = 0
    check_rows(rows, torch.tensor([1e-12, 1e-20, 1e15, 1.0]), weights, torch.tensor([2, 3, 1, 4]), "trellis")


def test_rows_that_lie_apart_and_share_weights() -> None:
    """``[2, 3, I]`` rows out of a larger tensor, weights ``[2, 1, I]``."""
    rows, weights = normal(2, 5, 40)[:, 1:4], normal(2, 1, 40, seed=1).abs()
    check_rows(rows, torch.ones(2, 3), weights, torch.tensor([[2, 6, 0], [8, 2, 1]]), "trellis")


def test_scales_are_those_of_plain_torch() -> None:
    """Five candidates for rows of all widths; the scale of the code comes with it."""
    bits = torch.tensor([ALL_WIDTHS, ALL_WIDTHS[::-1]])
    rows, weights = normal(*bits.shape, 40), normal(2, 1, 40, seed=1).abs()
    start = torch.full(bits.shape, 16.0)
    start[0, :3], start[1, :3] = 0, 31
    low, step = torch.full((bits.shape[1],), -3.0), torch.full((bits.shape[1],), 0.2)
    arguments = rows, weights, bits, start, low, step
    code, scale = (t.cpu() for t in TRITON.choose_scales(*moved(*arguments)))
    wanted = scale_grid.nearby_codes(*arguments)
    assert torch.equal(code[bits > 0], wanted[bits > 0])
    assert torch.allclose(scale, torch.exp2(low + code * step), rtol=1e-6)


def test_packed_words_are_those_of_the_cpu() -> None:
    """Rows of all widths, in the order of the payload; an expert without rows."""
    bits = torch.tensor([ALL_WIDTHS, ALL_WIDTHS[::-1], [0] * len(ALL_WIDTHS)])
    codes = torch.randint(2**16, (*bits.shape, 64), generator=torch.Generator().manual_seed(0))
    codes = (codes % 2 ** bits[..., None]).to(torch.int32)
    found = TRITON.pack(*moved(codes, bits))
    for words, own, width in zip(found, codes, bits, strict=True):
        assert words.device.type == "cpu"
        assert torch.equal(words, layout.pack_expert(own, width))


@pytest.mark.parametrize("passed_on", [True, False])
def test_rounding_along_the_rank_agrees_with_plain_torch(
    passed_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors reach the rows after; without feedback rows are rounded in groups."""
    monkeypatch.setattr(TRITON, "values_together", 200)
    factors, moments = normal(2, 2, 5, 40), normal(1, 2, 5, 8, seed=1)
    moments = moments @ moments.transpose(-1, -2)
    feedback = Feedback.of(moments, 0.01)
    if not passed_on:
        feedback = Feedback.none(moments.diagonal(dim1=-2, dim2=-1), 0.01)
    bits = torch.tensor([0, 2, 3, 6, 4]).expand(2, 2, 5)
    grid = ScaleGrid(torch.full((2, 5), -2.0).half(), torch.full((2, 5), 0.1).half())
    weights, scales = normal(2, 2, 40, seed=2).abs(), torch.full((2, 2, 5), 0.9)
    there = Feedback(*(None if t is None else t.to(DEVICE) for t in vars(feedback).values()))
    found = feedback_rounding.round_along_rank(
        *moved(factors, bits), there, weights.to(DEVICE), ScaleGrid(*moved(grid.low, grid.step)),
        scales.to(DEVICE), "uniform", backend=TRITON,
    )  # fmt: skip
    wanted = feedback_rounding.round_along_rank(
        factors, bits, feedback, weights, grid, scales, "uniform", backend=REFERENCE
    )
    assert (found.codes.cpu() == wanted.codes).float().mean() > SAME
    assert torch.allclose(found.errors.sum().cpu(), wanted.errors.sum(), rtol=1e-3)
    assert torch.allclose(found.values.cpu(), wanted.values, atol=1e-4)
