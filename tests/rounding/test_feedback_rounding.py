"""Rounding with error feedback against linear algebra and rate-distortion theory."""

from __future__ import annotations

import pytest
import torch
from rounding_support import EXPERTS, RANK, SIZE, both_grids, mixed_widths, normal
from torch import Tensor

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec import row_codec, uniform
from bitsmoe_plugin.codec.backends import RoundingBackend
from bitsmoe_plugin.codec.backends.native import COMPILED
from bitsmoe_plugin.codec.backends.reference import REFERENCE
from bitsmoe_plugin.codec.row_codec import GRIDS
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS, ScaleGrid
from bitsmoe_plugin.rounding import feedback_rounding, row_scales
from bitsmoe_plugin.rounding.feedback_rounding import RoundedRows
from bitsmoe_plugin.spectral.error_feedback import Feedback

NOTHING = Feedback(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1))


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


def turned(error: Tensor, rounder) -> Tensor:
    """``[..., n, columns]`` with n the axis that ``rounder`` goes along."""
    return error.transpose(-1, -2) if rounder is round_neurons else error


def in_halves(tensor: Tensor) -> Tensor:
    """The first half of the experts as gate, the second as up."""
    return tensor.unflatten(0, (2, -1))


def round_rank(
    factor: Tensor, bits: Tensor, feedback: Feedback, grid: str, scale_grid: ScaleGrid | None = None
) -> tuple[RoundedRows, Tensor]:
    """``round_along_rank`` with equal neurons, half of the experts as gate and half as up.

    Returns:
        rows without the axis of gate and up, and their scales ``[e, rank]``.
    """
    ones = torch.ones(2, len(factor) // 2, factor.shape[2])
    factor, bits = in_halves(factor), in_halves(bits)
    scales = row_scales.best_scales(factor, ones[:, :, None], bits, grid)
    scale_grid = scale_grid or ScaleGrid.covering(scales, bits > 0)
    if scale_grid.low.dim() == 1:
        scale_grid = ScaleGrid(scale_grid.low.expand(2, -1), scale_grid.step.expand(2, -1))
    rows = feedback_rounding.round_along_rank(
        factor,
        bits,
        Feedback(in_halves(feedback.unit), in_halves(feedback.variance)),
        ones,
        scale_grid,
        scales,
        grid,
    )
    used = scale_grid.decode(rows.scale_codes.float()).flatten(0, 1)
    return RoundedRows(*(tensor.flatten(0, 1) for tensor in vars(rows).values())), used


def round_neurons(
    factor: Tensor, bits: Tensor, feedback: Feedback, grid: str, scale_grid: ScaleGrid | None = None
) -> tuple[RoundedRows, Tensor]:
    """The same for ``round_along_neurons``."""
    weights = feedback.variance[:, None]
    scales = row_scales.best_scales(factor, weights, bits, grid)
    scale_grid = scale_grid or ScaleGrid.covering(scales, bits > 0)
    rows = feedback_rounding.round_along_neurons(factor, bits, feedback, scale_grid, scales, grid)
    return rows, scale_grid.decode(rows.scale_codes.float())


def one_scale(scale: float) -> ScaleGrid:
    """A grid on which every code is the same scale, wide enough that nothing is clipped."""
    return ScaleGrid(torch.full((RANK,), scale).log2().half(), torch.zeros(RANK).half())


def test_variance_is_the_schur_complement() -> None:
    """Variance of coordinate k that the later ones leave: C_kk - C_kl C_ll^-1 C_lk."""
    moment = moments(RANK)
    variance = Feedback.of(moment, 1e-9).variance
    exact = moment.double()
    for k in range(RANK):
        cross, rest = exact[:, k, k + 1 :, None], exact[:, k + 1 :, k + 1 :]
        explained = (cross.transpose(1, 2) @ torch.linalg.solve(rest, cross)).flatten()
        torch.testing.assert_close(variance[:, k].double(), exact[:, k, k] - explained, rtol=1e-4, atol=0)


def test_feedback_factors_the_damped_moments() -> None:
    """unit diag(variance) unit^T = C + damping * mean diagonal."""
    moment = moments(RANK)
    feedback = Feedback.of(moment, 0.01)
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    unit = feedback.unit
    assert torch.equal(unit, unit.triu())
    assert torch.equal(unit.diagonal(dim1=1, dim2=2), torch.ones(EXPERTS, RANK))
    product = (unit * feedback.variance[:, None]) @ unit.transpose(1, 2)
    torch.testing.assert_close(product, moment + 0.01 * mean * torch.eye(RANK), rtol=1e-4, atol=1e-5)
    plain = Feedback.none(moment.diagonal(dim1=-2, dim2=-1), 0.01)
    assert plain.unit is None
    torch.testing.assert_close(plain.variance, moment.diagonal(dim1=1, dim2=2) + 0.01 * mean[..., 0])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backend", [None, REFERENCE])
def test_no_feedback_is_feedback_of_a_diagonal(grid: str, backend: RoundingBackend | None) -> None:
    """Guards the short way through both roundings: nothing is passed on where nothing is correlated. The
    root weights of a block are the same up to their last bit, so a near tie may differ."""
    factor, bits = normal(2, EXPERTS, RANK, SIZE), mixed_widths(4)[None].repeat(2, 1, 1)
    variance = torch.rand(EXPERTS, RANK, generator=torch.Generator().manual_seed(1)) + 0.5
    unit = torch.eye(RANK).expand(1, EXPERTS, -1, -1)
    ones = torch.ones(2, EXPERTS, SIZE)
    scales = row_scales.best_scales(factor, ones[:, :, None], bits, grid)
    scale_grid = ScaleGrid.covering(scales, bits > 0)
    along_rank = [
        feedback_rounding.round_along_rank(
            factor, bits, Feedback(units, variance[None]), ones, scale_grid, scales, grid, backend=backend
        )
        for units in (None, unit)
    ]
    variance = torch.rand(EXPERTS, SIZE, generator=torch.Generator().manual_seed(2)) + 0.5
    own = ScaleGrid(scale_grid.low[0], scale_grid.step[0])
    along_neurons = [
        feedback_rounding.round_along_neurons(
            factor[0], bits[0], Feedback(units, variance), own, scales[0], grid
        )
        for units in (None, torch.eye(SIZE).expand(EXPERTS, -1, -1))
    ]
    for short, long in (along_rank, along_neurons):
        assert torch.equal(short.scale_codes, long.scale_codes)
        torch.testing.assert_close(short.errors, long.errors, rtol=1e-4, atol=1e-12)
        assert float((short.codes == long.codes).float().mean()) > 0.999


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_compiled_rounding_is_as_good_as_the_reference(name: str, grid: str) -> None:
    """Same targets, same scales but for near ties, the same search: the error agrees to 1 % in sum and nearly
    all rows of the first pass have the same codes (later ones may follow another near tie)."""
    if native.select(name) is None:
        pytest.skip("no compiled library, or not on this machine")
    try:
        factor, bits = normal(2, 6, RANK, SIZE), mixed_widths(9)[:, None].repeat(1, 6, 1)
        weights = torch.rand(2, 6, SIZE, generator=torch.Generator().manual_seed(0)) + 0.1
        feedback = Feedback.of(moments(RANK)[:, None].repeat(1, 6, 1, 1), 0.01)
        scales = row_scales.best_scales(factor, weights[:, :, None], bits, grid)
        scale_grid = ScaleGrid.covering(scales, bits > 0)
        fast, slow = (
            feedback_rounding.round_along_rank(
                factor, bits, feedback, weights, scale_grid, scales, grid, backend=backend
            )
            for backend in (COMPILED, REFERENCE)
        )
    finally:
        native.select(None)
    assert float(fast.errors.sum()) == pytest.approx(float(slow.errors.sum()), rel=0.01)
    assert float((fast.codes[:, :, 0] == slow.codes[:, :, 0]).float().mean()) > 0.95
    assert float((fast.scale_codes == slow.scale_codes).float().mean()) > 0.9
    read = row_codec.decode(fast.codes, scale_grid.decode(fast.scale_codes.float()), bits, SIZE, grid)
    torch.testing.assert_close(fast.values, read, rtol=1e-6, atol=0)


both_rounders = pytest.mark.parametrize("rounder", [round_rank, round_neurons])


@both_rounders
@both_grids
def test_without_correlation_it_is_plain_rounding(rounder, grid: str) -> None:
    """Nothing to compensate: the codes are those of each row alone under the chosen scales, on the
    uniform grid the nearest ones."""
    factor, bits = normal(EXPERTS, RANK, SIZE), mixed_widths()
    n = RANK if rounder is round_rank else SIZE
    rows, scales = rounder(factor, bits, Feedback.of(torch.eye(n).repeat(EXPERTS, 1, 1), 0), grid)
    alone = row_codec.encode(factor, scales, torch.ones(1), bits, grid)
    assert torch.equal(rows.codes, alone)
    if grid == "uniform":
        nearest = uniform.encode(factor, scales[..., None], bits[..., None])
        assert torch.equal(rows.codes[..., :SIZE].float(), nearest)


@both_rounders
@both_grids
def test_values_are_what_the_codes_decode_to(rounder, grid: str) -> None:
    """Guards what later steps (refit, trial, compensation) compute with: a reader's values. Scales
    come from float32 exp2 of tensors of another shape: 1e-6."""
    factor, bits = normal(EXPERTS, RANK, SIZE), mixed_widths(3)
    n = RANK if rounder is round_rank else SIZE
    rows, scales = rounder(factor, bits, Feedback.of(moments(n), 0.01), grid)
    read = row_codec.decode(rows.codes, scales, bits, SIZE, grid)
    torch.testing.assert_close(rows.values, read, rtol=1e-6, atol=0)


@both_rounders
@both_grids
def test_errors_add_up_to_the_error_of_the_factor(rounder, grid: str) -> None:
    """d^T C d over all rows and columns, mixed widths, undamped. float32 sums of triangular solves
    with condition numbers of a few hundred: 1e-3."""
    factor, bits = normal(EXPERTS, RANK, SIZE), mixed_widths(4)
    moment = moments(RANK if rounder is round_rank else SIZE)
    rows, _ = rounder(factor, bits, Feedback.of(moment, 1e-7), grid)
    assert rows.errors.shape == bits.shape
    exact = quadratic(turned(rows.values - factor, rounder), moment)
    assert float(rows.errors.double().sum()) == pytest.approx(exact, rel=1e-3)


def test_errors_of_down_rows_are_those_of_each_row() -> None:
    """Nothing is passed on between rows along the neurons: each has its own d^T C d, 1e-3 as above."""
    factor, bits, moment = normal(EXPERTS, RANK, SIZE), mixed_widths(5), moments(SIZE)
    rows, _ = round_neurons(factor, bits, Feedback.of(moment, 1e-7), "trellis")
    error = (rows.values - factor).double()
    exact = ((error @ moment.double()) * error).sum(-1)
    torch.testing.assert_close(rows.errors.double(), exact, rtol=1e-3, atol=0)


def test_errors_of_gate_and_up_weigh_their_neurons() -> None:
    """sum_i n_i d_i^T C d_i, over the neurons i of gate and of up: 1e-3 as above."""
    factors, bits = normal(2, 1, RANK, SIZE), mixed_widths(6)[:, None]
    moment = moments(RANK)[:, None]
    weights = torch.rand(2, 1, SIZE, generator=torch.Generator().manual_seed(0)) + 0.1
    scales = row_scales.best_scales(factors, weights[:, :, None], bits, "trellis")
    scale_grid = ScaleGrid.covering(scales, bits > 0)
    feedback = Feedback.of(moment, 1e-7)
    rows = feedback_rounding.round_along_rank(factors, bits, feedback, weights, scale_grid, scales, "trellis")
    for part in range(2):
        error = (rows.values - factors)[part, 0] * weights[part, 0].sqrt()
        exact = quadratic(error, moment[part, 0])
        assert float(rows.errors[part].double().sum()) == pytest.approx(exact, rel=1e-3)


@both_grids
def test_gate_and_up_do_not_disturb_each_other(grid: str) -> None:
    """They are rounded side by side: the codes are those that each gets beside a copy of itself."""
    factor, bits = normal(2, RANK, SIZE), mixed_widths(7)
    feedback = Feedback.of(moments(RANK), 0.01)
    together, _ = round_rank(factor, bits, feedback, grid)
    for part in range(2):
        pair = [part, part]
        alone, _ = round_rank(factor[pair], bits[pair], feedback[pair], grid)
        assert torch.equal(alone.codes[0], together.codes[part])
        assert torch.equal(alone.scale_codes[1], together.scale_codes[part])


def expected_gain_of_feedback(moment: Tensor) -> float:
    """Error with feedback over error without, for fine, hence white, rounding errors on uniform grids:
    the part of each coordinate's variance that later ones do not explain, C_kk - C_kl C_ll^-1 C_lk."""
    left = 0.0
    for k in range(len(moment)):
        cross, later = moment[k, k + 1 :].double(), moment[k + 1 :, k + 1 :].double()
        left += float(moment[k, k]) - float(cross @ torch.linalg.solve(later, cross))
    return left / float(moment.trace())


@pytest.mark.parametrize(("rounder", "tolerance"), [(round_rank, 0.05), (round_neurons, 0.12)])
def test_feedback_reaches_the_conditional_variance(rounder, tolerance: float) -> None:
    """Fine rounding: feedback brings the error down to the variance that later coordinates leave.

    Neighbours at 0.9 along the rank, 1 - 0.9^2 = 0.19 per row; a factor common to all neurons. 1440 or
    more independent errors per coordinate: 5 % along the rank. With a common factor mostly the sum of a
    row's errors counts, and the mean square of 1440 such sums varies by 4 %: 12 %.
    """
    wide = one_scale(2.0)
    factor, bits = normal(EXPERTS * 20, RANK, SIZE), torch.full((EXPERTS * 20, RANK), 8)
    n = RANK if rounder is round_rank else SIZE
    moment = neighbours(n, 0.9) if rounder is round_rank else 0.1 * torch.eye(n) + 0.9
    feedback = Feedback.of(moment.repeat(len(factor), 1, 1), 1e-6)
    rounded = rounder(factor, bits, feedback, "uniform", wide)[0].values
    plain = rounder(factor, bits, Feedback.of(torch.eye(n).repeat(len(factor), 1, 1), 0), "uniform", wide)[
        0
    ].values
    with_feedback, without = (
        quadratic(turned(values - factor, rounder), moment) for values in (rounded, plain)
    )
    expected = expected_gain_of_feedback(moment)
    assert expected < 0.5, "the example has nothing to gain"
    assert with_feedback / without == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("bits", [1, 2, 3])
@both_rounders
@both_grids
def test_feedback_pays_at_coarse_widths(rounder, bits: int, grid: str) -> None:
    """Guards against overshoot where rounding errors are as large as the values. Three blocks of
    neurons, as the first to be rounded is made up for by the others only."""
    size = SIZE if rounder is round_rank else 96
    factor, widths = normal(EXPERTS, RANK, size), torch.full((EXPERTS, RANK), bits)
    n = RANK if rounder is round_rank else size
    moment = neighbours(n, 0.9) if rounder is round_rank else 0.1 * torch.eye(n) + 0.9
    feedback = Feedback.of(moment.repeat(EXPERTS, 1, 1), 0.01)
    rounded = rounder(factor, widths, feedback, grid)[0].values
    plain = rounder(factor, widths, Feedback.of(torch.eye(n).repeat(EXPERTS, 1, 1), 0), grid)[0].values
    errors = [quadratic(turned(values - factor, rounder), moment) for values in (rounded, plain)]
    assert errors[0] < 0.8 * errors[1]


@both_rounders
@pytest.mark.parametrize(("bits", "share"), [(1, 0.84), (2, 0.66), (4, 0.6)])
def test_trellis_beats_the_uniform_grid_with_feedback(rounder, bits: int, share: float) -> None:
    """The point of the trellis, after scales have been stored and errors passed on. It leaves 0.84,
    0.66 and 0.47 of a Gaussian's uniform error, but 0.6 at 4 bits if each row of 64 values has its best
    scale (measured). 0.1 more is allowed for the partial block of each row, and another 0.1 for neurons,
    where the uniform grid passes errors on inside blocks and the trellis cannot."""
    factor, widths = normal(EXPERTS, RANK, SIZE), torch.full((EXPERTS, RANK), bits)
    moment = moments(RANK if rounder is round_rank else SIZE)
    feedback = Feedback.of(moment, 0.01)
    errors = {}
    for grid in GRIDS:
        values = rounder(factor, widths, feedback, grid)[0].values
        errors[grid] = quadratic(turned(values - factor, rounder), moment)
    allowed = share + (0.1 if rounder is round_rank else 0.2)
    assert errors["trellis"] < allowed * errors["uniform"]


@both_grids
def test_later_rows_make_up_for_a_dropped_row(grid: str) -> None:
    """Row 0 at width 0, the others at 16 bits: what remains is row 0's energy times the variance
    of z_0 that the others do not explain. Steps of 4e-4 add less than 1e-3 of that."""
    factor, bits = normal(EXPERTS, RANK, SIZE), torch.full((EXPERTS, RANK), 16)
    bits[:, 0] = 0
    moment = moments(RANK)
    feedback = Feedback.of(moment, 1e-6)
    rows, _ = round_rank(factor, bits, feedback, grid, one_scale(2.0))
    assert rows.codes[:, 0].abs().max() == 0
    assert rows.values[:, 0].abs().max() == 0
    wanted = float((factor[:, 0].square().sum(-1) * feedback.variance[:, 0]).sum())
    assert quadratic(rows.values - factor, moment) == pytest.approx(wanted, rel=1e-3)


@both_rounders
@both_grids
def test_codes_and_scale_codes_fit_their_fields(rounder, grid: str) -> None:
    """Guards the packed format: a code beyond its width would spill into the next value."""
    factor, bits = normal(EXPERTS, RANK, SIZE), mixed_widths(1)
    n = RANK if rounder is round_rank else SIZE
    rows, _ = rounder(factor, bits, Feedback.of(moments(n), 0.01), grid)
    assert rows.codes.shape == (EXPERTS, RANK, 64)
    assert rows.codes.dtype == torch.int32
    assert bool((rows.codes >= 0).all())
    assert bool((rows.codes < 2 ** bits[..., None]).all())
    assert rows.scale_codes.dtype == torch.uint8
    assert int(rows.scale_codes.max()) < SCALE_LEVELS
    assert rows.values[bits == 0].abs().max() == 0
    assert bool((rows.values[bits > 0].norm(dim=-1) > 0).all())


@both_rounders
@both_grids
def test_same_input_same_rows(rounder, grid: str) -> None:
    """Guards the promise of determinism: everything bitwise, and the input is left as it was."""
    factor, bits = normal(EXPERTS, RANK, SIZE), mixed_widths(8)
    n = RANK if rounder is round_rank else SIZE
    feedback = Feedback.of(moments(n), 0.01)
    before = factor.clone()
    first, again = (rounder(factor, bits, feedback, grid)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert torch.equal(factor, before)


@both_grids
def test_important_neurons_get_the_better_scale(grid: str) -> None:
    """Guards the use of neuron weights: one heavy outlier neuron at 2 bits is kept if it counts."""
    factor, bits = normal(2, 1, 1, SIZE), torch.full((2, 1, 1), 2)
    factor[..., 0] = 8.0
    weights = torch.ones(2, 1, SIZE)
    weights[:, 0, 0] = torch.tensor([1e-6, 1e3])
    scales = row_scales.best_scales(factor, weights[:, :, None], bits, grid)
    scale_grid = ScaleGrid(torch.full((2, 1), -2.0).half(), torch.full((2, 1), 0.25).half())
    rows = feedback_rounding.round_along_rank(factor, bits, NOTHING, weights, scale_grid, scales, grid)
    errors = (rows.values - factor)[:, 0, 0, 0].abs()
    assert errors[0] > 4
    assert errors[1] < 1
