"""Rounding with error feedback against linear algebra and rate-distortion theory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin import grids, rounding
from bitsmoe_plugin.config import ALL_WIDTHS
from bitsmoe_plugin.rounding import SCALE_LEVELS, ScaleGrid

EXPERTS, RANK, SIZE = 2, 24, 40


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(n: int, seed: int = 0) -> Tensor:
    """``[EXPERTS, n, n]`` sample second moments of correlated coordinates."""
    mixed = normal(EXPERTS, 4 * n, n, seed=seed) @ (
        torch.eye(n) + 0.5 * normal(EXPERTS, n, n, seed=seed + 1) / n**0.5
    )
    return mixed.transpose(1, 2) @ mixed / (4 * n)


def neighbours(n: int, correlation: float) -> Tensor:
    """``[n, n]``: correlation**|i - j|."""
    i = torch.arange(n)
    return correlation ** (i - i[:, None]).abs().float()


def quadratic(error: Tensor, moment: Tensor) -> float:
    """Sum of d^T C d over the columns d of ``error`` ``[..., n, columns]``."""
    return float((error.double() * (moment.double() @ error.double())).sum())


def round_rank(
    factor: Tensor, bits: Tensor, feedback: Tensor, grid: ScaleGrid | None = None
) -> tuple[Tensor, Tensor, Tensor, ScaleGrid]:
    """Codes, scale codes, decoded values and grid of ``round_along_rank`` with equal neurons."""
    ones = torch.ones(len(factor), factor.shape[2])
    scales = rounding.best_scales(factor, ones[:, None], bits, ALL_WIDTHS)
    grid = grid or ScaleGrid.covering(scales, bits > 0)
    codes, scale_codes = rounding.round_along_rank(factor, bits, feedback, ones, grid, scales)
    return codes, scale_codes, decoded(codes, scale_codes, grid, bits), grid


def round_neurons(
    factor: Tensor, bits: Tensor, feedback: Tensor, grid: ScaleGrid | None = None
) -> tuple[Tensor, Tensor, Tensor, ScaleGrid]:
    """The same for ``round_along_neurons``."""
    weights = rounding.conditional_variance(feedback)[:, None]
    scales = rounding.best_scales(factor, weights, bits, ALL_WIDTHS)
    grid = grid or ScaleGrid.covering(scales, bits > 0)
    codes, scale_codes = rounding.round_along_neurons(factor, bits, feedback, grid, scales)
    return codes, scale_codes, decoded(codes, scale_codes, grid, bits), grid


def decoded(codes: Tensor, scale_codes: Tensor, grid: ScaleGrid, bits: Tensor) -> Tensor:
    """Values as a reader of the format computes them."""
    scales = torch.exp2(grid.low.float() + scale_codes.float() * grid.step.float())
    return grids.decode(codes.float(), scales[..., None], bits[..., None])


def one_scale(scale: float) -> ScaleGrid:
    """A grid on which every code is the same scale, wide enough that nothing is clipped."""
    return ScaleGrid(torch.full((RANK,), scale).log2().half(), torch.zeros(RANK).half())


def mixed_widths(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(ALL_WIDTHS)[torch.randint(len(ALL_WIDTHS), (EXPERTS, RANK), generator=generator)]


def test_feedback_factor_is_the_upper_root_of_the_inverse() -> None:
    """U^T U = (C + damping * mean diagonal)^-1, upper triangular. float32 storage: 1e-5."""
    moment = moments(RANK)
    factor = rounding.feedback_factor(moment, 0.01)
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    inverse = torch.linalg.inv((moment + 0.01 * mean * torch.eye(RANK)).double()).float()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.transpose(1, 2) @ factor, inverse, rtol=1e-4, atol=1e-5)


def test_conditional_variance_is_the_schur_complement() -> None:
    """Variance of coordinate k that the later ones leave: C_kk - C_kl C_ll^-1 C_lk."""
    moment = moments(RANK)
    variance = rounding.conditional_variance(rounding.feedback_factor(moment, 1e-9))
    exact = moment.double()
    for k in range(RANK):
        cross, rest = exact[:, k, k + 1 :, None], exact[:, k + 1 :, k + 1 :]
        explained = (cross.transpose(1, 2) @ torch.linalg.solve(rest, cross)).flatten()
        torch.testing.assert_close(variance[:, k].double(), exact[:, k, k] - explained, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rounder", [round_rank, round_neurons])
def test_without_correlation_it_is_plain_rounding(rounder) -> None:
    """Nothing to compensate: the codes are the nearest ones under the chosen scales."""
    factor, bits = normal(EXPERTS, RANK, SIZE), mixed_widths()
    n = RANK if rounder is round_rank else SIZE
    codes, scale_codes, _, grid = rounder(factor, bits, torch.eye(n).expand(EXPERTS, n, n))
    scales = grid.decode(scale_codes.float())[..., None]
    assert torch.equal(codes.float(), grids.encode(factor, scales, bits[..., None]))


@pytest.mark.parametrize("rounder", [round_rank, round_neurons])
def test_feedback_reaches_the_conditional_variance(rounder) -> None:
    """Fine rounding of coordinates with neighbour correlation 0.9: feedback brings the error
    d^T C d down from the variance, 1, to the conditional variance, 1 - 0.9^2 = 0.19 (and 1 for
    the last of n coordinates). 960 to 1600 independent errors per coordinate: 5 %."""
    wide = one_scale(2.0)
    factor, bits = normal(EXPERTS * 20, RANK, SIZE), torch.full((EXPERTS * 20, RANK), 8)
    n = RANK if rounder is round_rank else SIZE
    moment = neighbours(n, 0.9)
    feedback = rounding.feedback_factor(moment, 1e-6).expand(len(factor), n, n)
    rounded = rounder(factor, bits, feedback, wide)[2]
    plain = rounder(factor, bits, torch.eye(n).expand(len(factor), n, n), wide)[2]
    errors = [value - factor for value in (rounded, plain)]
    if rounder is round_neurons:
        errors = [error.transpose(1, 2) for error in errors]
    with_feedback, without = (quadratic(error, moment) for error in errors)
    assert with_feedback / without == pytest.approx((0.19 * (n - 1) + 1) / n, rel=0.05)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("rounder", [round_rank, round_neurons])
def test_feedback_pays_at_coarse_widths(rounder, bits: int) -> None:
    """Guards against overshoot where rounding errors are as large as the values."""
    factor, widths = normal(EXPERTS, RANK, SIZE), torch.full((EXPERTS, RANK), bits)
    n = RANK if rounder is round_rank else SIZE
    moment = neighbours(n, 0.9)
    rounded = rounder(factor, widths, rounding.feedback_factor(moment, 0.01).expand(EXPERTS, n, n))[2]
    plain = rounder(factor, widths, torch.eye(n).expand(EXPERTS, n, n))[2]
    turn = (lambda error: error.transpose(1, 2)) if rounder is round_neurons else (lambda error: error)
    assert quadratic(turn(rounded - factor), moment) < 0.8 * quadratic(turn(plain - factor), moment)


def test_later_rows_make_up_for_a_dropped_row() -> None:
    """Row 0 at width 0, the others at 16 bits: what remains is row 0's energy times the variance
    of z_0 that the others do not explain. Steps of 4e-4 add less than 1e-3 of that."""
    factor, bits = normal(EXPERTS, RANK, SIZE), torch.full((EXPERTS, RANK), 16)
    bits[:, 0] = 0
    moment = moments(RANK)
    feedback = rounding.feedback_factor(moment, 1e-6)
    codes, _, values, _ = round_rank(factor, bits, feedback, one_scale(2.0))
    assert codes[:, 0].abs().max() == 0
    assert values[:, 0].abs().max() == 0
    wanted = float((factor[:, 0].square().sum(-1) * rounding.conditional_variance(feedback)[:, 0]).sum())
    assert quadratic(values - factor, moment) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("rounder", [round_rank, round_neurons])
def test_codes_and_scale_codes_fit_their_fields(rounder) -> None:
    """Guards the packed format: a code beyond its width would spill into the next value."""
    factor, bits = normal(EXPERTS, RANK, SIZE), mixed_widths(1)
    n = RANK if rounder is round_rank else SIZE
    codes, scale_codes, values, _ = rounder(factor, bits, rounding.feedback_factor(moments(n), 0.01))
    assert bool((codes >= 0).all())
    assert bool((codes < 2 ** bits[..., None]).all())
    assert scale_codes.dtype == torch.uint8
    assert int(scale_codes.max()) < SCALE_LEVELS
    assert values[bits == 0].abs().max() == 0
    assert bool((values[bits > 0] != 0).all())


def test_important_neurons_get_the_better_scale() -> None:
    """Guards the use of neuron weights: one heavy outlier neuron at 2 bits is kept if it counts."""
    factor, bits = normal(1, 1, SIZE), torch.full((1, 1), 2)
    factor[0, 0, 0] = 8.0
    errors = []
    for weight in (1e-6, 1e3):
        weights = torch.ones(1, SIZE)
        weights[0, 0] = weight
        scales = rounding.best_scales(factor, weights[:, None], bits, (2,))
        grid = ScaleGrid(torch.tensor([-2.0]).half(), torch.tensor([0.25]).half())
        codes, scale_codes = rounding.round_along_rank(
            factor, bits, torch.ones(1, 1, 1), weights, grid, scales
        )
        errors.append((decoded(codes, scale_codes, grid, bits) - factor)[0, 0, 0].abs().item())
    assert errors[0] > 4
    assert errors[1] < 1


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


def test_best_scales_treats_each_row_at_its_own_width() -> None:
    """Row by row the same as one width at a time; 0 for dropped rows."""
    rows, bits = normal(EXPERTS, RANK, SIZE), mixed_widths(2)
    weights = torch.rand(EXPERTS, 1, SIZE)
    scales = rounding.best_scales(rows, weights, bits, ALL_WIDTHS)
    for e in range(EXPERTS):
        for k in range(RANK):
            alone = grids.best_scale(rows[e, k], weights[e, 0], int(bits[e, k]))[0]
            torch.testing.assert_close(scales[e, k, None], alone)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_unbiased_scales_keep_the_length_along_the_row(bits: int) -> None:
    """One bit: codes are signs, so <rounded, row> = <row, row> exactly; wider rows may change
    codes when the scale grows, but must come closer by a third than the least squares scale does."""
    rows, widths = normal(1, 200, 64), torch.full((1, 200), bits)
    ones = torch.ones(1, 1, 64)

    def kept(scales: Tensor) -> Tensor:
        values = grids.round_to_grid(rows, scales[..., None], bits)
        return (values * rows).sum(-1) / rows.square().sum(-1)

    plain = kept(rounding.best_scales(rows, ones, widths, (bits,)))
    unbiased = kept(rounding.unbiased_scales(rows, ones, widths, (bits,)))
    assert float((unbiased - 1).abs().mean()) < float((plain - 1).abs().mean()) * 2 / 3
    if bits == 1:
        torch.testing.assert_close(unbiased, torch.ones_like(unbiased))
