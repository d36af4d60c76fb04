"""The rate-distortion bound against closed forms and bisection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_plugin.allocation.rate_distortion import water_filling_bits


def by_bisection(energies: Tensor, error: float, size: int) -> float:
    """Lower the water level until the error is reached, then add up the bits above it."""
    v = energies.double()
    low, high = 0.0, float(v.max())
    for _ in range(200):
        level = (low + high) / 2
        if float(v.clamp_max(level).sum()) > error:
            high = level
        else:
            low = level
    return float((v / low).log2().clamp_min(0).sum()) * size / 2


def random_energies(count: int, decades: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (decades * (torch.rand(count, generator=generator, dtype=torch.double) - 0.5))


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0])
def test_equal_rows_share_the_error(rows: int, bits: float) -> None:
    """n values at b bits each leave 4**-b of the energy, and no less."""
    energies = torch.full((rows,), 3.0)
    least = water_filling_bits(energies, 3.0 * rows * 4**-bits, size=40)
    assert least == pytest.approx(rows * 40 * bits, rel=1e-9)


def test_two_rows_by_hand() -> None:
    """Energies 16 and 1. Error 2: both at level 1, the weak one gets nothing, the strong one
    log2(16) / 2 = 2 bits per value. Error 1: level 1/2, log2(32) / 2 and log2(2) / 2."""
    energies = torch.tensor([16.0, 1.0])
    assert water_filling_bits(energies, 2.0, size=10) == pytest.approx(20)
    assert water_filling_bits(energies, 1.0, size=10) == pytest.approx(25 + 5)
    assert water_filling_bits(energies, 4.0, size=10) == pytest.approx(10 * 0.5 * math.log2(16 / 3))


@given(
    count=st.integers(1, 60),
    decades=st.floats(0, 12),
    share=st.floats(1e-9, 0.999),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_bisection(count: int, decades: float, share: float, seed: int) -> None:
    """Random energies, any order. The bisection's level is good to 1e-15 of the largest energy, at
    worst 1e-6 of the level: absolute error 1e-6 per value."""
    energies = random_energies(count, decades, seed)
    error = share * float(energies.sum())
    wanted = by_bisection(energies, error, size=8)
    assert water_filling_bits(energies, error, size=8) == pytest.approx(wanted, rel=1e-6, abs=1e-5 * count)


@pytest.mark.parametrize("share", [1.0 + 1e-9, 2.0, 1e9])
def test_no_bits_if_all_may_be_dropped(share: float) -> None:
    """The error of dropping every row needs no code; no energy at all needs none either."""
    energies = random_energies(20, 6, 0)
    assert water_filling_bits(energies, share * float(energies.sum()), size=8) == 0
    assert water_filling_bits(torch.zeros(5), 1e-9, size=8) == 0


def test_less_error_needs_more_bits() -> None:
    """Strictly, over 12 decades of error, and without a jump where a row emerges from the water: the
    slope is -d bits / d log2(error) = size / 2 times (error / level), at most the number of rows."""
    energies = random_energies(30, 6, 1)
    errors = float(energies.sum()) * torch.logspace(-12, 0, 2000, dtype=torch.double)
    bits = torch.tensor([water_filling_bits(energies, float(error), size=2) for error in errors])
    assert bool((bits.diff() < 0).all())
    octaves = float((errors[1] / errors[0]).log2())
    assert float(bits.diff().abs().max()) <= 30 * octaves * (1 + 1e-3)
    assert float(bits[-1]) == pytest.approx(0, abs=1e-6)


def test_rows_without_energy_and_shapes_do_not_matter() -> None:
    """Energies come as [3, E, r] float32, with zeros for dead rows; bits scale with the row's size."""
    energies = random_energies(24, 4, 2)
    bits = water_filling_bits(energies, 0.1, size=40)
    padded = torch.cat([energies, torch.zeros(6)]).view(3, 2, 5)
    assert water_filling_bits(padded, 0.1, size=40) == pytest.approx(bits, rel=1e-9)
    assert water_filling_bits(energies, 0.1, size=80) == pytest.approx(2 * bits, rel=1e-9)
    assert water_filling_bits(energies.float(), 0.1, size=40) == pytest.approx(bits, rel=1e-5)


def test_the_trellis_and_the_uniform_grid_obey_the_bound() -> None:
    """The bound is one: what a real code leaves of Gaussian rows of many energies takes more bits than
    the bound asks for; the trellis comes closer (0.16 bits at 2 bits) than the uniform grid (0.46)."""
    from bitsmoe_plugin.codec import row_codec

    scales = random_energies(64, 2, 3).sqrt().float()
    rows = scales[:, None] * torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    bits = torch.full((64,), 2)
    energies = rows.square().sum(-1)
    over = {}
    for grid in row_codec.GRIDS:
        error = (row_codec.round_rows(rows, scales, torch.ones(1), bits, grid) - rows).square().sum()
        over[grid] = 2 - water_filling_bits(energies, float(error), 512) / rows.numel()
    assert 0 < over["trellis"] < 0.7 * over["uniform"]
