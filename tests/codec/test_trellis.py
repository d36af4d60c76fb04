"""Trellis-coded rows against bit strings, exact searches and the error that the tables promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec import row_codec, trellis
from bitsmoe_plugin.codec.backends.native import COMPILED
from bitsmoe_plugin.codec.backends.reference import REFERENCE
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.trellis import WIDTHS, WINDOW
from bitsmoe_plugin.codec.trellis import search as trellis_search

MEAN_SQUARE_ERROR = {1: 0.305, 2: 0.078, 3: 0.0201, 4: 0.0054}
"""Of a unit Gaussian, from the module text."""

SEAM_LOSS = {1: 0.06, 2: 0.05, 3: 0.035, 4: 0.02}
"""What closing the ring in two passes may cost on average. Measured on 1000 Gaussian blocks: 0.047,
0.037, 0.024 and 0.007; the means of 60 blocks differ from that by about a fifth."""

every_width = pytest.mark.parametrize("bits", WIDTHS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.int32)


def slow_windows(block: list[int], bits: int) -> list[int]:
    """Windows of one block, from its string of bits, least significant first: the 8 bits that end with
    those of code i, around the ring, the last one most significant."""
    ring = "".join(format(code, f"0{bits}b")[::-1] for code in block)
    windows = []
    for i in range(len(block)):
        end = (i + 1) * bits
        windows.append(int("".join(ring[j % len(ring)] for j in range(end - WINDOW, end))[::-1], 2))
    return windows


def optimum(values: np.ndarray, weights: np.ndarray, table: np.ndarray, bits: int) -> float:
    """Least cost of any codes of one block: for every state of the ring's seam, the best path that
    starts and ends in it. A state is what the next window keeps of this one: its upper bits."""
    states = 2 ** (WINDOW - bits)
    windows = np.arange(2**WINDOW)
    before, after = windows % states, windows >> bits
    order = np.argsort(after, kind="stable")  # windows by the state they lead to, 2**bits for each
    cost = np.full((states, states), np.inf)  # [state at the seam, state now]
    np.fill_diagonal(cost, 0.0)
    for value, weight in zip(values, weights, strict=True):
        reached = cost[:, before] + weight * (value - table) ** 2
        cost = reached[:, order].reshape(states, states, 2**bits).min(-1)
    return float(cost.diagonal().min())


def cost_of(codes: Tensor, rows: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Weighted squared error of each row, float64."""
    return ((trellis.decode(codes, bits).double() - rows.double()).square() * weights.double()).sum(-1)


@every_width
def test_windows_are_the_last_bits_of_the_ring(bits: int) -> None:
    """Guards the format: bit order, ring of one block (not of the row), several blocks and axes."""
    codes = random_codes(6, 3 * BLOCK, bits).view(2, 3, -1)
    wanted = [
        [
            window
            for block in torch.tensor(row).view(-1, BLOCK).tolist()
            for window in slow_windows(block, bits)
        ]
        for row in codes.flatten(0, 1).tolist()
    ]
    assert torch.equal(trellis.windows(codes, bits), torch.tensor(wanted).view_as(codes))


@every_width
def test_decoding_looks_windows_up(bits: int) -> None:
    """Values are the int8 of the stored table over 32, and the dtype of the codes does not matter."""
    codes = random_codes(5, 2 * BLOCK, bits, seed=1)
    stored = trellis.TABLES[bits]
    assert stored.dtype == np.int8
    assert stored.shape == (2**WINDOW,)
    wanted = [
        [
            int(stored[window]) / 32
            for block in (row[:BLOCK], row[BLOCK:])
            for window in slow_windows(block, bits)
        ]
        for row in codes.tolist()
    ]
    for dtype in (torch.int32, torch.int64, torch.uint8):
        values = trellis.decode(codes.to(dtype), bits)
        assert values.dtype == torch.float32
        assert torch.equal(values, torch.tensor(wanted))


def test_the_reference_finds_the_optimum_of_a_ring_that_can_be_searched() -> None:
    """Guards the reference below: three values of 4 bits, all 4096 rings tried."""
    table = trellis.table(4).double().numpy()
    rings = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij"), -1).reshape(-1, 3)
    values = table[rings << 4 | np.roll(rings, 1, 1)]
    for seed in range(5):
        row, weights = normal(3, seed=seed).double().numpy(), uniform(3, seed=seed).double().numpy()
        best = ((values - row) ** 2 * weights).sum(-1).min()
        assert optimum(row, weights, table, 4) == pytest.approx(best, rel=1e-9)


@every_width
@pytest.mark.parametrize("weighting", ["equal", "random", "some zero"])
def test_the_search_comes_close_to_the_tail_biting_optimum(bits: int, weighting: str) -> None:
    """Never below the optimum (table values are exact in float32: 1e-9), and on average close to it:
    guards against a search that loses paths, or learns nothing about the seam."""
    rows = normal(60, BLOCK, seed=bits)
    weights = torch.ones_like(rows)
    if weighting != "equal":
        weights = uniform(*rows.shape, seed=bits) + 0.01
    if weighting == "some zero":
        weights *= uniform(*rows.shape, seed=bits + 10) < 0.7
    found = cost_of(trellis.encode(rows, weights, bits), rows, weights, bits).numpy()
    table = trellis.table(bits).double().numpy()
    pairs = zip(rows.double().numpy(), weights.double().numpy(), strict=True)
    best = np.array([optimum(row, weight, table, bits) for row, weight in pairs])
    assert bool((found >= best - 1e-9).all())
    assert found.mean() < (1 + SEAM_LOSS[bits]) * best.mean()


@every_width
def test_error_of_a_gaussian_is_the_promised_one(bits: int) -> None:
    """65,536 values; guards against a wrong table or search. 2 %: the table of the module text has
    three digits, and the mean of that many squared errors varies by less than 1 %."""
    rows = normal(64, 1024, seed=7)
    codes = trellis.encode(rows, torch.ones_like(rows), bits)
    error = (trellis.decode(codes, bits) - rows).double().square().mean()
    assert float(error) == pytest.approx(MEAN_SQUARE_ERROR[bits], rel=0.02)


@every_width
@pytest.mark.parametrize("rows", [1, 63, 64, 65])
def test_codes_fit_their_fields(bits: int, rows: int) -> None:
    """Whatever the number of blocks (64 are searched side by side): shape, dtype, range, all used."""
    codes = trellis.encode(normal(rows, 3 * BLOCK), torch.ones(rows, 3 * BLOCK), bits)
    assert codes.shape == (rows, 3 * BLOCK)
    assert codes.dtype == torch.int32
    assert torch.equal(codes.unique(), torch.arange(2**bits, dtype=torch.uint8))


@every_width
def test_rows_do_not_depend_on_their_neighbours(bits: int) -> None:
    """Guards against lanes of the search that mix: alone, in another order and in a crowd, bitwise."""
    rows, weights = normal(70, 2 * BLOCK, seed=2), uniform(70, 2 * BLOCK, seed=3)
    together = trellis.encode(rows, weights, bits)
    alone = torch.cat([trellis.encode(rows[i, None], weights[i, None], bits) for i in range(70)])
    assert torch.equal(alone, together)
    assert torch.equal(trellis.encode(rows.flip(0), weights.flip(0), bits).flip(0), together)
    assert torch.equal(trellis.encode(rows, weights, bits), together)
    blocks = trellis.encode(rows.view(-1, BLOCK), weights.view(-1, BLOCK), bits)
    assert torch.equal(blocks.view_as(together), together)


@every_width
def test_more_threads_find_the_same_codes(bits: int) -> None:
    """Guards against groups of blocks that share a buffer."""
    rows, weights = normal(500, BLOCK, seed=4), torch.ones(500, BLOCK)
    one = trellis.encode(rows, weights, bits)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(trellis.encode(rows, weights, bits), one)
    finally:
        torch.set_num_threads(threads)


@every_width
def test_padding_of_no_weight_does_not_disturb(bits: int) -> None:
    """What stands in the padding makes no difference, and the values beside it do no worse than in a
    full block, as the padding's bits are free: 65,536 / 32 blocks, 2 % for chance."""
    rows, weights = normal(2048, BLOCK, seed=5), torch.ones(2048, BLOCK)
    rows[:, 20:], weights[:, 20:] = 0.0, 0.0
    codes = trellis.encode(rows, weights, bits)
    other = rows.clone()
    other[:, 20:] = normal(2048, BLOCK - 20, seed=6)
    assert torch.equal(trellis.encode(other, weights, bits), codes)
    error = (trellis.decode(codes, bits) - rows)[:, :20].double().square().mean()
    assert float(error) < 1.02 * MEAN_SQUARE_ERROR[bits]


@every_width
@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e30, 1e37])
def test_only_ratios_of_weights_matter(bits: int, factor: float) -> None:
    """Guards float32 sums of statistics that are tiny or huge: almost the same error, relative to it,
    as with weights of unit size. Ties may fall differently: 1e-3."""
    rows, weights = normal(20, BLOCK, seed=8), uniform(20, BLOCK, seed=9) + 0.01
    plain, scaled = (
        cost_of(trellis.encode(rows, used, bits), rows, weights, bits).mean()
        for used in (weights, weights * factor)
    )
    assert float(scaled) == pytest.approx(float(plain), rel=1e-3)


@every_width
def test_rows_without_weight_get_codes(bits: int) -> None:
    """Neurons that calibration never excited: any codes will do, but they must fit."""
    codes = trellis.encode(normal(3, BLOCK), torch.zeros(3, BLOCK), bits)
    assert int(codes.max()) < 2**bits
    assert bool(torch.isfinite(trellis.decode(codes, bits)).all())


@every_width
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e3])
def test_rows_far_from_unit_size_get_valid_codes(bits: int, size: float) -> None:
    """A stored scale may be far from the row's: codes stay valid, tiny rows decode to about nothing
    (no larger error than that of the closest path to zero, below a Gaussian's), huge rows to values
    of their signs where the trellis allows it: at 1 bit for 0.8 of their sum (measured: 0.9)."""
    rows = size * normal(70, BLOCK, seed=11)
    codes = trellis.encode(rows, torch.ones_like(rows), bits)
    assert int(codes.max()) < 2**bits
    values = trellis.decode(codes, bits)
    if size < 1:
        assert float(values.square().mean()) < MEAN_SQUARE_ERROR[bits]
    else:
        assert float(rows.abs()[values * rows > 0].sum() / rows.abs().sum()) > 0.8


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest):
    """Rounding compiled for one instruction set, if this machine has it."""
    if native.select(request.param) is None:
        pytest.skip("no compiled library, or not on this machine")
    yield request.param
    native.select(None)


CASES = ("gaussian", "weighted", "some zero", "outliers", "zeros", "huge", "heavy tails", "far")


def given(case: str, bits: int) -> tuple[Tensor, Tensor]:
    """300 blocks and their weights."""
    rows = normal(300, BLOCK, seed=bits)
    weights = torch.ones_like(rows) if case == "gaussian" else uniform(300, BLOCK, seed=bits)
    if case == "some zero":
        weights[:, ::3] = 0
    if case == "outliers":
        rows[:, 5] *= 30
    if case == "zeros":
        rows *= 0
    if case == "huge":
        weights *= 1e30
    if case == "heavy tails":
        rows /= uniform(300, BLOCK, seed=9).sqrt()
    if case == "far":
        rows *= 20
    if case == "wide":
        weights = torch.exp2(10 * weights)
    if case == "lone":
        weights /= 1000
        weights[:, 5] = 1
    if case == "not finite":
        rows[:, 3], rows[:100, 7], rows[100:, 9] = torch.inf, torch.nan, 1e38
        weights[200:250, 7], weights[250:, 4] = torch.inf, torch.nan
    return rows, weights


def found_and_wanted(rows: Tensor, weights: Tensor, bits: int) -> list[Tensor]:
    """What the codes of the search in use, and of the reference, cost each block."""
    return [
        cost_of(search(trellis.table(bits), rows, weights, bits), rows, weights, bits)
        for search in (trellis_search.search, trellis_search.search_reference)
    ]


@every_width
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_search_is_as_good_as_the_reference(instruction_set: str, bits: int, case: str) -> None:
    """Both search the same paths, with costs in float32 (compiled: in integers): block by block the cost is
    the same but for near ties at the seam, on average to 0.2 %."""
    costs = found_and_wanted(*given(case, bits), bits)
    assert float(costs[0].sum()) == pytest.approx(float(costs[1].sum()), rel=2e-3)
    assert float(((costs[0] - costs[1]).abs() > 1e-4 * costs[1]).float().mean()) < 0.05


@every_width
@pytest.mark.parametrize(("case", "lost"), [("wide", 2e-3), ("lone", 0.08)])
def test_weights_far_apart_in_a_block_are_told_apart(
    instruction_set: str, bits: int, case: str, lost: float
) -> None:
    """Integers of 16 bits cannot hold weights that are 2**10 apart and more (``lone``: all but one are a
    thousandth of it and less) as float32 does: guards a scale by which the small ones become nothing.
    Measured: at most 0.0004 and 0.048 (4 bits; fewer: 0.022)."""
    costs = found_and_wanted(*given(case, bits), bits)
    assert float(costs[0].sum()) < (1 + lost) * float(costs[1].sum())


@every_width
def test_an_outlier_of_weight_leaves_the_rest_of_its_block_alone(instruction_set: str, bits: int) -> None:
    """30 deviations away, with a thousand times the weight: whatever its code, it is out of reach. Guards a
    scale by which the others become nothing: their error would be about 1.5. The window of the largest value
    takes some of their bits: measured 1.3 to 1.7 of the error without it."""
    rows, weights = normal(300, BLOCK, seed=bits), torch.ones(300, BLOCK)
    rows[:, 5], weights[:, 5] = 30, 1000
    values = trellis.decode(trellis.encode(rows, weights, bits), bits)
    assert float(values[:, 5].min()) > 0.8 * float(trellis.table(bits).max())
    others = (values - rows).double().square()
    others[:, 5] = 0
    assert float(others.sum()) / (300 * 31) < 2.5 * MEAN_SQUARE_ERROR[bits]


@every_width
@pytest.mark.parametrize("case", [*CASES, "wide", "lone", "not finite"])
def test_every_instruction_set_finds_the_same_codes(bits: int, case: str) -> None:
    """Costs are integers: guards one that is rounded in another way, and sums that overflow in one alone."""
    rows, weights = given(case, bits)
    found = []
    try:
        for name in ("avx512", "avx2", "portable"):
            if native.select(name) is not None:
                found.append(trellis.encode(rows, weights, bits))
    finally:
        native.select(None)
    if len(found) < 2:
        pytest.skip("no compiled library, or one instruction set only")
    assert all(torch.equal(codes, found[0]) for codes in found)


@every_width
def test_a_block_s_codes_do_not_depend_on_its_neighbours_or_on_threads(
    instruction_set: str, bits: int
) -> None:
    """Guards bitwise equality of runs that group experts in another way."""
    rows, weights = normal(700, BLOCK, seed=1), uniform(700, BLOCK, seed=2)
    threads = torch.get_num_threads()
    together = trellis.encode(rows, weights, bits)
    try:
        torch.set_num_threads(1)
        apart = torch.cat(
            [trellis.encode(r, w, bits) for r, w in zip(rows.split(33), weights.split(33), strict=True)]
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, apart)


@every_width
def test_values_that_are_not_finite_still_give_codes(instruction_set: str, bits: int) -> None:
    """Overflow in a hopeless row must not write outside its field."""
    rows = normal(20, BLOCK)
    rows[:, 3], rows[:10, 7], rows[10:, 9] = torch.inf, torch.nan, 1e38
    codes = trellis.encode(rows, torch.ones_like(rows), bits)
    assert bool(((codes >= 0) & (codes < 2**bits)).all())


@pytest.mark.parametrize("grid", ["trellis", "uniform"])
@pytest.mark.parametrize(
    ("rows", "weights"), [((2, 3, 70, 48), (2, 3, 1, 48)), ((140, 40), (140, 40)), ((5, 7, 64), (64,))]
)
def test_compiled_rows_of_mixed_widths_have_the_values_of_their_codes(
    rows: tuple[int, ...], weights: tuple[int, ...], grid: str
) -> None:
    """Codes of least error as of the reference (0.2 % for near ties), and values bitwise as they are decoded:
    guards rows that take another's weights, scale or width, and a last block that is filled up."""
    if native.library() is None:
        pytest.skip("no compiled library")
    x, w, scales = normal(*rows), uniform(*weights, seed=1) + 0.01, uniform(*rows[:-1], seed=2) + 0.5
    bits = torch.randint(9, rows[:-1], generator=torch.Generator().manual_seed(3))
    codes, values = COMPILED.rounded(x, scales, w, bits, grid)
    assert torch.equal(values, row_codec.decode(codes, scales, bits, rows[-1], grid))
    wanted = REFERENCE.rounded(x, scales, w, bits, grid)[1]
    errors = [((v - x).double().square() * w).sum().item() for v in (values, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)
