"""Scalar grids against the theory of the uniform quantizer and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec import uniform

WIDTHS = sorted(uniform.STEP)
ONE = torch.ones(1, 1)

# Mean squared error of the optimal uniform quantizer of a unit Gaussian: Max (1960), table II;
# 6 to 8 bits from integrating the density in float64 and minimizing over the step.
DISTORTION = {
    1: 0.3634,
    2: 0.1188,
    3: 0.03744,
    4: 0.01154,
    5: 0.003495,
    6: 0.001040,
    7: 0.0003043,
    8: 0.00008769,
}


@pytest.fixture(scope="module")
def gaussian() -> tuple[Tensor, Tensor]:
    """Points of [-9, 9] and their share of the unit Gaussian: a sum over them is an integral."""
    x = torch.linspace(-9, 9, 360_001, dtype=torch.float64)
    share = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    return x.float()[None], share.float()[None]


def distortion(gaussian: tuple[Tensor, Tensor], scale: float, bits: int) -> float:
    x, share = gaussian
    error = uniform.round_to_grid(x, scale * ONE, bits) - x
    return float((error.double().square() * share).sum())


@pytest.mark.parametrize(("bits", "textbook"), DISTORTION.items())
def test_gaussian_distortion_is_the_textbook_value(gaussian: tuple, bits: int, textbook: float) -> None:
    """Guards against a wrong step or an off-centre grid. The table has four digits: 5e-4."""
    assert distortion(gaussian, 1.0, bits) == pytest.approx(textbook, rel=5e-4)


@pytest.mark.parametrize("bits", DISTORTION)
def test_no_other_step_is_better(gaussian: tuple, bits: int) -> None:
    """Guards against a typing error in the step table: 2 % beside the optimum is worse."""
    best = distortion(gaussian, 1.0, bits)
    assert best < distortion(gaussian, 0.98, bits)
    assert best < distortion(gaussian, 1.02, bits)


def test_sixteen_bits_have_granular_noise_only(gaussian: tuple) -> None:
    """step**2 / 12; clipping beyond 6.3 standard deviations adds 0.4 %."""
    assert distortion(gaussian, 1.0, 16) == pytest.approx(uniform.STEP[16] ** 2 / 12, rel=0.01)


@pytest.mark.parametrize("bits", WIDTHS)
def test_encode_finds_the_nearest_level(bits: int) -> None:
    """Guards against wrong rounding or clamping: no level of the documented grid is nearer.

    Values reach past both ends. A value halfway between levels may go either way, and float32
    places it to 2**-24 of its size: the tolerance.
    """
    scale = torch.tensor([[0.02], [1.0], [70.0]])
    half = (2**bits - 1) / 2
    rows = (
        torch.randn(3, 60, generator=torch.Generator().manual_seed(bits)) * scale * uniform.STEP[bits] * half
    )
    levels = scale.double() * uniform.STEP[bits] * (torch.arange(2**bits) - half)
    nearest = (rows.double()[..., None] - levels[:, None]).abs().amin(-1)
    codes = uniform.encode(rows, scale, bits)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    reached = (rows.double() - levels.gather(1, codes.long())).abs()
    assert bool((reached <= nearest + rows.abs() * 2**-22).all())
    torch.testing.assert_close(uniform.decode(codes, scale, bits).double(), levels.gather(1, codes.long()))


def test_width_tensor_gives_what_each_width_gives_alone() -> None:
    """Guards against wrong broadcasting where every row has its own width."""
    widths = torch.tensor([0, *WIDTHS])[:, None]
    rows = torch.randn(len(widths), 50, generator=torch.Generator().manual_seed(1)) * 2
    scale = torch.rand(len(widths), 1, generator=torch.Generator().manual_seed(2)) + 0.5
    codes = uniform.encode(rows, scale, widths)
    values = uniform.decode(codes, scale, widths)
    for row, bits in enumerate(widths.flatten().tolist()):
        alone = uniform.encode(rows[row], scale[row], bits)
        assert torch.equal(codes[row], alone)
        assert torch.equal(values[row], uniform.decode(alone, scale[row], bits))


def test_width_zero_is_code_zero_and_value_zero() -> None:
    """A dropped row must contribute nothing, not an offset."""
    rows = torch.tensor([[3.0, -2.0, 0.0]])
    for width in (0, torch.tensor([[0]])):
        assert torch.equal(uniform.encode(rows, ONE, width), torch.zeros(1, 3))
        assert uniform.round_to_grid(rows, ONE, width).abs().max() == 0
    scale, error = uniform.best_scale(rows, torch.tensor([[1.0, 2.0, 1.0]]), 0)
    assert scale.item() == 0
    assert error.item() == 9 + 2 * 4


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_rows_stay_zero(bits: int) -> None:
    """Guards against 0 / 0: the row of a dead neuron has no scale."""
    rows = torch.zeros(2, 8)
    scale, error = uniform.best_scale(rows, torch.ones_like(rows), bits)
    values = uniform.round_to_grid(rows, scale, bits)
    assert bool(torch.isfinite(scale).all())
    assert error.abs().max() == 0
    assert values.abs().max() < 1e-30
    assert uniform.round_to_grid(torch.ones(1, 3), torch.zeros(1, 1), bits).abs().max() == 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_values_clip_to_the_outermost_levels(bits: int) -> None:
    """Guards against codes that overflow their width, which would spill into the next value."""
    rows = torch.tensor([[1e30, -1e30, torch.inf, -torch.inf, 3e38]])
    codes = uniform.encode(rows, torch.tensor([[1e-20]]), bits)
    top = 2**bits - 1
    assert codes.tolist() == [[top, 0, top, 0, top]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("power", [-50, 0, 40])
def test_best_scale_is_the_best_candidate(bits: int, power: int) -> None:
    """Guards against returning a scale and an error that do not belong together, or not the least."""
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(4, 3, 64, generator=generator).pow(3) * 2.0**power
    weights = torch.rand(4, 1, 64, generator=generator)
    scale, error = uniform.best_scale(rows, weights, bits)
    candidates = uniform.candidate_scales(rows, bits)
    costs = torch.stack(
        [((uniform.round_to_grid(rows, s, bits) - rows) ** 2 * weights).sum(-1) for s in candidates]
    )
    # Compiled code multiplies by the inverse of a step: at 16 bits half of float32's digits are the code.
    torch.testing.assert_close(error, costs.amin(0), rtol=1e-4 if bits < 16 else 0.05, atol=1e-36)
    index = costs.argmin(0)[None, ..., None]
    torch.testing.assert_close(scale, candidates.gather(0, index)[0], rtol=1e-5, atol=0)


def test_candidates_reach_the_largest_value() -> None:
    """The last candidate clips nothing, so heavy-tailed rows keep their outlier if that pays."""
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).pow(5)
    for bits in WIDTHS:
        last = uniform.candidate_scales(rows, bits)[-1]
        reach = last * uniform.STEP[bits] * (2**bits - 1) / 2
        torch.testing.assert_close(reach, rows.abs().amax(-1, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_few_candidates_suffice(bits: int) -> None:
    """Guards against a search range that misses the optimum.

    200 scales lower the error of short rows by 9 % at most (measured: 8 bits), worth 0.06 bits.
    """
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(bits))
    ones = torch.ones_like(rows)
    deviation = rows.square().mean(-1, keepdim=True).sqrt()
    fine = torch.stack(
        [
            ((uniform.round_to_grid(rows, deviation * s, bits) - rows) ** 2).sum(-1)
            for s in torch.linspace(0.4, 2, 200)
        ]
    )
    assert float(uniform.best_scale(rows, ones, bits)[1].mean() / fine.amin(0).mean()) < 1.10


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("bits", [0, 1, 2, 4, 8, 16])
def test_compiled_scales_are_those_of_the_reference(name: str, bits: int) -> None:
    """Distortions to 1e-4 (at 16 bits float32 leaves 1 % of a rounding error of 1e-5); rows of zeros and of
    one value, and weights shared by rows, as given or one for each."""
    if native.select(name) is None:
        pytest.skip("no compiled library, or not on this machine")
    try:
        generator = torch.Generator().manual_seed(bits)
        rows = torch.randn(4, 30, 50, generator=generator)
        rows[0, 0], rows[0, 1] = 0, 0.5
        for weights in (
            torch.rand(4, 1, 50, generator=generator),
            torch.rand(4, 30, 50, generator=generator),
        ):
            scale, distortion = uniform.best_scale(rows, weights, bits)
            _, wanted = uniform.best_scale_reference(rows, weights, bits)
            tolerance = 1e-4 if bits < 16 else 5e-2
            torch.testing.assert_close(distortion, wanted, rtol=tolerance, atol=1e-12)
            widths = torch.full((4, 30), bits)
            assert torch.equal(uniform.best_scales(rows, weights, widths), scale[..., 0])
    finally:
        native.select(None)
