"""Rows of mixed widths to codes and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.codec import row_codec, trellis
from bitsmoe_plugin.codec import uniform as uniform_grid
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.row_codec import GRIDS
from bitsmoe_plugin.presets import ALL_WIDTHS

both_grids = pytest.mark.parametrize("grid", GRIDS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed_rows(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[3, 16, size]`` of evenly spread values without outliers, their standard deviations and
    widths; every width occurs."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(12 * torch.rand(3, 16, generator=generator) - 6)
    bits = torch.tensor(ALL_WIDTHS * 6).view(3, 16)[:, torch.randperm(16, generator=generator)]
    spread = 3**0.5 * (2 * torch.rand(3, 16, size, generator=generator) - 1)
    return spread * scales[..., None], scales, bits


@pytest.mark.parametrize(("size", "whole"), [(1, 32), (31, 32), (32, 32), (33, 64), (40, 64), (96, 96)])
def test_sizes_are_padded_to_whole_blocks(size: int, whole: int) -> None:
    """Sizes of the packed layout."""
    assert row_codec.padded(size) == whole


@both_grids
@pytest.mark.parametrize("size", [1, 20, 32, 40, 77])
def test_codes_fit_and_decode_to_about_the_rows(size: int, grid: str) -> None:
    """Guards against a row that gets the width, scale or codes of another: the error of
    each width is that of a unit Gaussian on the uniform grid (Max, 1960, table II) or less. Rows of one
    value may be unlucky: times 4."""
    rows, scales, bits = mixed_rows(size)
    codes = row_codec.encode(rows, scales, torch.ones(1), bits, grid)
    assert codes.shape == (3, 16, row_codec.padded(size))
    assert codes.dtype == torch.int32
    assert bool((codes >= 0).all())
    assert bool((codes < 2 ** bits[..., None]).all())
    values = row_codec.decode(codes, scales, bits, size, grid)
    assert values.shape == rows.shape
    error = ((values - rows) / scales[..., None]).square().mean(-1)
    for width, limit in {1: 0.363, 2: 0.119, 3: 0.0374, 4: 0.0115, 6: 1e-3, 8: 9e-5, 16: 3e-9}.items():
        assert float(error[bits == width].mean()) < 4 * limit
    assert torch.equal(values, row_codec.round_rows(rows, scales, torch.ones(1), bits, grid))


@both_grids
def test_rounded_rows_are_rounded_to_themselves(grid: str) -> None:
    """Guards decode against encode: values that can be reached are, up to the seam of a block, where
    the trellis search may settle for codes beside the exact ones (but not at 6 bits and more)."""
    rows, scales, bits = mixed_rows(96)
    rounded = row_codec.round_rows(rows, scales, torch.ones(1), bits, grid)
    again = row_codec.round_rows(rounded, scales, torch.ones(1), bits, grid)
    same = (again == rounded).float().mean(-1)
    assert bool((same[bits > (4 if grid == "trellis" else 0)] == 1).all())
    assert float(same.mean()) > 0.95


@both_grids
def test_width_zero_gives_zeros(grid: str) -> None:
    """Dropped rows: codes and values, whatever row and scale."""
    rows, bits = normal(4, 40), torch.zeros(4, dtype=torch.int64)
    scales = torch.tensor([0.0, 1.0, 1e-30, 1e30])
    codes = row_codec.encode(rows, scales, torch.ones(1), bits, grid)
    assert torch.equal(codes, torch.zeros(4, 64, dtype=torch.int32))
    assert torch.equal(row_codec.decode(codes, scales, bits, 40, grid), torch.zeros(4, 40))


@both_grids
@pytest.mark.parametrize("width", [width for width in ALL_WIDTHS if width])
def test_each_width_is_coded_as_documented(width: int, grid: str) -> None:
    """Up to 4 bits by trellis, in whole blocks with free padding; wider and with grid="uniform" each
    value alone, padded with zeros. Weights reach the trellis only."""
    rows, scales = normal(9, 40, seed=width), torch.full((9,), 1.25)
    weights = torch.rand(9, 40, generator=torch.Generator().manual_seed(width))
    bits = torch.full((9,), width)
    codes = row_codec.encode(rows, scales, weights, bits, grid)
    values = row_codec.decode(codes, scales, bits, 40, grid)
    if grid == "trellis" and width <= 4:
        padded = [torch.nn.functional.pad(tensor, (0, 24)) for tensor in (rows / 1.25, weights)]
        assert torch.equal(codes.to(torch.uint8), trellis.encode(*padded, width))
        assert torch.equal(values, 1.25 * trellis.decode(codes, width)[:, :40])
        assert not torch.equal(codes, row_codec.encode(rows, scales, torch.ones(1), bits, grid))
    else:
        plain = uniform_grid.encode(rows, scales[:, None], width)
        assert torch.equal(codes[:, :40].float(), plain)
        assert int(codes[:, 40:].abs().max()) == 0
        assert torch.equal(values, uniform_grid.decode(plain, scales[:, None], width))


# Mean squared error on a unit Gaussian that theory allows. Uniform grid: the optimal uniform quantizer, Max
# (1960), table II; 6 and 8 bits by integrating the density; 16 bits step**2 / 12. Trellis: a code with memory
# must beat every code without, so the optimal scalar quantizer, same paper, table I.
UNIFORM_CEILING = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 6: 1.040e-3, 8: 8.769e-5}
SCALAR_CEILING = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@both_grids
@pytest.mark.parametrize("width", [width for width in ALL_WIDTHS if width])
def test_error_is_below_the_ceiling_and_above_the_floor(width: int, grid: str) -> None:
    """Guards every width as rows are stored. Floor: the distortion-rate function 4**-width (Shannon 1959),
    below which a measurement is wrong. 65,536 values; the mean of their squared errors varies by 1 %: 2 %."""
    rows = normal(64, 1024, seed=14)
    rounded = row_codec.round_rows(rows, torch.ones(64), torch.ones(1), torch.full((64,), width), grid)
    error = float((rounded - rows).double().square().mean())
    ceiling = {**UNIFORM_CEILING, 16: uniform_grid.STEP[16] ** 2 / 12}[width]
    if row_codec.uses_trellis(width, grid):
        ceiling = SCALAR_CEILING[width]
    assert 4.0**-width < error < 1.02 * ceiling


@both_grids
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_expected_gain_is_that_of_a_gaussian(width: int, grid: str) -> None:
    """Guards the costs of the allocation: error over that of the uniform grid, 65,536 values. The
    mean of so many squared errors varies by less than 1 %; scales fitted to each row of 1024 values
    move the ratio by up to 2 %: 5 %."""
    rows, ones = normal(64, 1024, seed=12), torch.ones(64)
    bits = torch.full((64,), width)
    error, uniform = (
        float((row_codec.round_rows(rows, ones, ones[:1], bits, used) - rows).double().square().mean())
        for used in (grid, "uniform")
    )
    assert row_codec.expected_gain(width, grid, 1024) == pytest.approx(error / uniform, rel=0.05)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_expected_gain_is_smaller_for_short_rows(width: int) -> None:
    """The uniform grid fits 64 values better than 1024; the trellis is a Gaussian code for both."""
    gains = [row_codec.expected_gain(width, "trellis", size) for size in (1024, 192, 64)]
    if width > 2:
        assert gains == sorted(gains)
    assert 0.4 < gains[0] < 0.9


@both_grids
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_extreme_scales_are_treated_like_ordinary_ones(scale: float, grid: str) -> None:
    """Guards against overflow: float32 keeps 1e-6 of each value at any scale that it can hold, so
    that codes are, but for ties, the same. No NaN."""
    rows, bits = normal(7, BLOCK, seed=13), torch.tensor([width for width in ALL_WIDTHS if width])
    plain, scaled = (
        row_codec.round_rows(rows * used, torch.full((7,), used), torch.ones(1), bits, grid) / used
        for used in (1.0, scale)
    )
    assert bool(torch.isfinite(scaled).all())
    assert bool(((scaled - plain).abs() < 1e-3).float().mean() > 0.98)


@both_grids
def test_zero_axes_and_row_shapes(grid: str) -> None:
    """Rows may have any leading axes, and there may be none of a width."""
    rows, scales, bits = mixed_rows(40)
    flat = row_codec.encode(rows.flatten(0, 1), scales.flatten(), torch.ones(1), bits.flatten(), grid)
    codes = row_codec.encode(rows, scales, torch.ones(1), bits, grid)
    assert torch.equal(flat.view_as(codes), codes)
    assert row_codec.encode(rows[:0], scales[:0], torch.ones(1), bits[:0], grid).shape == (0, 16, 64)
