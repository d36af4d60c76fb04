"""Scales of rows: the grid that stores them, the ones of least error, the widened ones."""

from __future__ import annotations

import pytest
import torch
from rounding_support import EXPERTS, RANK, SIZE, both_grids, mixed_widths, normal
from torch import Tensor

from bitsmoe_plugin.codec import row_codec
from bitsmoe_plugin.codec import uniform as uniform_grid
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS, ScaleGrid
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.rounding import row_scales


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 15.0])
def test_scale_grid_covers_used_scales_to_half_a_step(spread: float) -> None:
    """Half a step, and what float16 does to the ends: 2**-11 of low and of the range."""
    octaves = torch.rand(50, RANK) * spread - 7
    used = torch.rand(50, RANK) < 0.7
    scales = torch.where(used, torch.exp2(octaves), torch.exp2(40 * torch.rand(50, RANK) - 20))
    grid = ScaleGrid.covering(scales, used)
    codes = grid.encode(scales)
    assert bool((codes == codes.round()).all())
    assert codes.min() >= 0
    assert codes.max() < SCALE_LEVELS
    off = (grid.decode(codes).log2() - octaves).abs()
    limit = grid.step.float() / 2 + 2**-11 * (8 + spread) + 1e-5
    assert bool((off <= limit)[used].all())
    assert bool((grid.step.float() <= spread / (SCALE_LEVELS - 1) + 0.01).all())


def test_scale_grid_without_used_rows_is_finite() -> None:
    """A rank index that every expert drops still stores a grid."""
    grid = ScaleGrid.covering(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool))
    assert bool(torch.isfinite(grid.decode(torch.full((3, 4), 31.0))).all())


@both_grids
def test_best_scales_treats_each_row_at_its_own_width(grid: str) -> None:
    """Row by row the same as all at once; 0 for dropped rows; uniform rows get the grid's own."""
    rows, bits = normal(EXPERTS, RANK, SIZE), mixed_widths(2)
    weights = torch.rand(EXPERTS, 1, SIZE)
    scales = row_scales.best_scales(rows, weights, bits, grid)
    assert bool(((scales > 0) == (bits > 0)).all())
    for e in range(EXPERTS):
        for k in range(RANK):
            alone = row_scales.best_scales(rows[e, k], weights[e, 0], bits[e, k], grid)
            torch.testing.assert_close(scales[e, k], alone)
            if grid == "uniform":
                uniform = uniform_grid.best_scale(rows[e, k], weights[e, 0], int(bits[e, k]))[0]
                torch.testing.assert_close(scales[e, k, None], uniform)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_best_scales_fit_the_trellis(bits: int) -> None:
    """The scale that is best for the uniform grid is not for the trellis: starting from it, the chosen
    scales must not leave more weighted error, and multiplying all by 0.8 or 1.25 must leave more."""
    rows, widths = normal(1, 200, 64), torch.full((1, 200), bits)
    weights = torch.rand(1, 1, 64, generator=torch.Generator().manual_seed(1))

    def error(scales: Tensor) -> float:
        values = row_codec.round_rows(rows, scales, weights, widths, "trellis")
        return float(((values - rows).square() * weights).sum())

    best = row_scales.best_scales(rows, weights, widths, "trellis")
    chosen = error(best)
    assert chosen <= error(row_scales.best_scales(rows, weights, widths, "uniform"))
    assert chosen < error(0.8 * best)
    assert chosen < error(1.25 * best)


@pytest.mark.parametrize("bits", [1, 2, 3])
@both_grids
def test_unbiased_scales_keep_the_length_along_the_row(bits: int, grid: str) -> None:
    """One bit on the uniform grid: codes are signs, so <rounded, row> = <row, row> exactly; else codes
    may change when the scale grows, the more so by trellis, where the search uses the freedom: it must
    come closer than the least squares scale by a third (trellis: a quarter)."""
    rows, widths = normal(1, 200, 64), torch.full((1, 200), bits)
    ones = torch.ones(1, 1, 64)

    def kept(scales: Tensor) -> Tensor:
        values = row_codec.round_rows(rows, scales, ones, widths, grid)
        return (values * rows).sum(-1) / rows.square().sum(-1)

    plain = kept(row_scales.best_scales(rows, ones, widths, grid))
    unbiased = kept(row_scales.unbiased_scales(rows, ones, widths, grid))
    assert float((unbiased - 1).abs().mean()) < float((plain - 1).abs().mean()) * (
        2 / 3 if grid == "uniform" else 3 / 4
    )
    if bits == 1 and grid == "uniform":
        torch.testing.assert_close(unbiased, torch.ones_like(unbiased))


@pytest.mark.parametrize("choose", [row_scales.best_scales, row_scales.unbiased_scales])
@both_grids
def test_scales_of_rows_of_zeros_are_finite(choose, grid: str) -> None:
    """Dead neurons and padded experts: zeros must come back as zeros, or nearly, without NaN."""
    rows = torch.zeros(1, len(ALL_WIDTHS), SIZE)
    bits = torch.tensor(ALL_WIDTHS)[None]
    scales = choose(rows, torch.ones(1), bits, grid)
    values = row_codec.round_rows(rows, scales, torch.ones(1), bits, grid)
    assert bool(torch.isfinite(scales).all())
    assert float(values.abs().max()) < 1e-30
