"""The allocation against brute force, its certificate, and its limits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmoe_plugin.allocation.knapsack import dual, solve, tables
from bitsmoe_plugin.allocation.knapsack.solve import Allocation, allocate, smallest_size
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.presets import ALL_WIDTHS

ROW = 64
"""Bits of one row at width 1."""
WIDTHS = [(0, 1, 2, 4), (3, 4), (2, 3, 8), (6, 8), (0, 16), (1, 2, 3, 4), (4,), (8, 16)]


def one_block_each(costs: np.ndarray, sizes: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arguments of ``allocate`` for units with sizes of their own."""
    return list(costs[:, None]), list(sizes)


def brute_force(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    """Least cost over all combinations."""
    choices = np.array(list(itertools.product(range(costs.shape[1]), repeat=len(costs))))
    units = np.arange(len(costs))
    fits = sizes[units, choices].sum(axis=1) <= budget
    return float(costs[units, choices].sum(axis=1)[fits].min())


def check(result: Allocation, costs: np.ndarray, sizes: np.ndarray, budget: int) -> None:
    """The numbers an allocation reports are those of its choice, and the choice is allowed.

    Args:
        sizes: ``[units, widths]`` or ``[widths]``.
    """
    units, sizes = np.arange(len(costs)), np.broadcast_to(sizes, costs.shape)
    assert np.isfinite(costs[units, result.choice]).all()
    assert result.size == sizes[units, result.choice].sum() <= budget == result.budget
    assert result.objective == pytest.approx(costs[units, result.choice].sum(), rel=1e-12)
    assert result.lower_bound <= result.objective * (1 + 1e-9)
    assert 0 <= result.relative_gap <= 1


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Few units, any costs: ties, zeros, wider but worse, orders of magnitude apart, forbidden."""
    widths = draw(st.sampled_from(WIDTHS))
    units = draw(st.integers(1, 5))
    cost = st.one_of(st.integers(0, 4).map(float), st.floats(0, 10), st.floats(-9, 9).map(lambda x: 10**x))
    shape = units * len(widths)
    costs = np.array(draw(st.lists(cost, min_size=shape, max_size=shape))).reshape(units, len(widths))
    for row in costs:
        row[list(draw(st.sets(st.integers(0, len(widths) - 1), max_size=len(widths) - 1)))] = np.inf
    scale = [draw(st.sampled_from([ROW, 2 * ROW])) for _ in range(units)]
    sizes = np.outer(scale, widths).astype(np.int64)
    least = smallest_size(*one_block_each(costs, sizes))
    return costs, sizes, least + draw(st.integers(0, int(sizes.max(axis=1).sum()) - least + ROW))


def check_against_brute_force(costs: np.ndarray, sizes: np.ndarray, budget: int) -> None:
    """Costs are handed to HiGHS with the largest scaled to one, it computes to 1e-7, and a choice may stay
    unimproved within what counts as proven: the tolerance."""
    result = allocate(*one_block_each(costs, sizes), budget)
    optimum = brute_force(costs, sizes, budget)
    tolerance = 1e-7 * costs[np.isfinite(costs)].max() + 1e-12 + solve.CERTIFIED * optimum
    check(result, costs, sizes, budget)
    assert result.lower_bound <= optimum + tolerance
    assert optimum <= result.objective + tolerance
    assert result.objective <= optimum + tolerance
    if result.core_units:
        assert result.lower_bound >= optimum - tolerance, "HiGHS solved it, but the certificate is loose"


@settings(max_examples=300)
@given(problems())
def test_small_problems_are_solved_to_optimality(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    """Guards against odd input: ties, forbidden choices, zero costs, budgets at both ends."""
    check_against_brute_force(*problem)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**31), widths=st.sampled_from(WIDTHS))
def test_contested_budgets_are_spent_to_optimality(seed: int, widths: tuple[int, ...]) -> None:
    """Guards the fixing of choices, the repair of the dual solution and the core: rows of different
    lengths with similar gain per bit, so that filling up greedily is often not optimal."""
    random = np.random.default_rng(seed)
    noise = random.uniform(0.5, 2, size=(6, len(widths)))
    costs = noise * random.integers(1, 6, size=(6, 1)) * 4.0 ** -np.array(widths)
    sizes = np.outer(random.integers(3, 8, size=6) * 32, widths)
    budget = random.integers(smallest_size(*one_block_each(costs, sizes)), sizes.max(axis=1).sum() + 1)
    check_against_brute_force(costs, sizes, int(budget))


@pytest.mark.parametrize("widths", [ALL_WIDTHS, (3, 4), (6, 8), (1, 2, 3)])
def test_smallest_budget_gives_the_smallest_widths(widths: tuple[int, ...]) -> None:
    """Guards against overspending where the price per bit must exceed every gain."""
    costs = np.random.default_rng(0).exponential(size=(50, 1)) * 4.0 ** -np.array(widths)
    sizes = np.array(widths) * ROW
    budget = 50 * widths[0] * ROW
    for spare in (0, 1, ROW - 1):
        result = allocate([costs], [sizes], budget + spare)
        check(result, costs, sizes, budget + spare)
        assert (result.choice == 0).all()


def test_forbidden_choices_keep_the_certificate() -> None:
    """Guards against inf * 0 in the dual: forbidding the drop of one row leaves the rest optimal."""
    costs = np.array([[np.inf, 2.0, 1.0], [4.0, 2.0, 0.0]])
    sizes = np.array([0, 32, 64])
    result = allocate([costs], [sizes], 96)
    check(result, costs, sizes, 96)
    assert result.choice.tolist() == [1, 2]


def test_more_than_enough_budget_takes_the_cheapest_and_of_those_the_smallest() -> None:
    """Guards against storing bits that buy nothing."""
    costs = np.array([[0.0, 0.0, 0.0], [3.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    result = allocate([costs], [[0, 32, 64]], 10_000)
    assert result.choice.tolist() == [0, 1, 2]
    assert result.objective == result.lower_bound == 2


def trained_like(units: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs that fall fourfold per bit, energies over four decades, noise on each distortion."""
    random = np.random.default_rng(1)
    energy = 10 ** random.uniform(-4, 0, size=(units, 1))
    costs = energy * 4.0 ** -np.array(ALL_WIDTHS) * random.uniform(0.7, 1.3, size=(units, len(ALL_WIDTHS)))
    return costs, np.array(ALL_WIDTHS) * 768


@pytest.mark.parametrize("bits", [0.5, 2.0, 3.7])
def test_many_units_are_proven_near_optimal(bits: float) -> None:
    """Guards the certificate at the size of a real layer: 1e-6 is far below any effect on quality."""
    costs, sizes = trained_like(20_000)
    budget = int(bits * 768 * len(costs)) + 5
    result = allocate([costs], [sizes], budget)
    check(result, costs, sizes, budget)
    assert result.relative_gap <= 1e-6
    assert budget - result.size < 768


@pytest.mark.parametrize("units", [300, 2_000])
def test_many_rows_beside_few_large_blocks_are_proven_near_optimal(units: int) -> None:
    """Guards the search where filling up falls far short: linear layers, whose choices are thousands of
    times the size of a row's, open all rows anew. To the last proof HiGHS would go on for minutes."""
    random = np.random.default_rng(3)
    rows, row_sizes = trained_like(units)
    weights, widths = random.integers(300_000, 12_000_000, size=12), np.array(ALL_WIDTHS)
    large = rows[:, 0].sum() * random.uniform(0.01, 0.04, size=(12, 1)) * 4.0**-widths
    costs, sizes = [rows, *large[:, None]], [row_sizes, *np.outer(weights, widths)]
    budget = units * 2 * 768 + int(weights.sum()) * 3 + 7
    result = allocate(costs, sizes, budget)
    assert result.core_units > 0
    assert result.size <= budget
    assert result.relative_gap <= solve.CERTIFIED


def test_same_problem_same_choice() -> None:
    """Guards the promise that the same input gives the same bytes."""
    costs, sizes = trained_like(2_000)
    first, second = (allocate([costs.copy()], [sizes.copy()], 3_000_000) for _ in range(2))
    assert np.array_equal(first.choice, second.choice)


def test_what_the_filled_solution_certifies_is_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows some are always left to spend the last bits on; HiGHS is for what that leaves open."""

    def refuse(*_: object) -> None:
        raise AssertionError("HiGHS was asked")

    costs, sizes = trained_like(200_000)
    monkeypatch.setattr(solve, "solve_core", refuse)
    result = allocate([costs], [sizes], 2 * 768 * len(costs))
    assert result.core_units == 0
    assert result.relative_gap <= solve.CERTIFIED


def test_the_solver_is_silent() -> None:
    """Guards ``--json``, which promises JSON alone on stdout, against what HiGHS prints from C
    (once per process, hence a fresh one)."""
    program = """
import numpy as np
from bitsmoe_plugin.allocation.knapsack import tables as cost_tables, dual
from bitsmoe_plugin.allocation.knapsack.solve import allocate
costs = np.array([[9.0, 5.0, 0.0], [8.0, 4.0, 0.0], [7.0, 6.0, 0.0]])
assert allocate([costs], [[0, 32, 64]], 160).core_units > 0
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == ""


def test_unreachable_budget_names_both_numbers() -> None:
    """The user must learn what would be reachable."""
    with pytest.raises(QuantizationError, match=r"191.*192"):
        allocate([np.array([[2.0, 1.0]] * 3)], [[64, 128]], 191)


def test_forbidden_choices_count_for_the_smallest_size() -> None:
    """Guards against calling a budget reachable that only forbidden choices meet."""
    problem = [np.array([[np.inf, 1.0], [2.0, 1.0]])], [[0, 32]]
    assert smallest_size(*problem) == 32
    with pytest.raises(QuantizationError, match="32"):
        allocate(*problem, 31)


def many(
    costs: list[np.ndarray], sizes: list[np.ndarray], budget: int, gathered: int, chunk: int
) -> Allocation:
    """``allocate`` with limits so low that few units are treated as many: sampled, bracketed, in chunks."""
    with (
        mock.patch.multiple(dual, GATHERED=gathered, SAMPLED=max(1, gathered // 2)),
        mock.patch.object(tables, "CHUNK", chunk),
    ):
        return allocate(costs, sizes, budget)


@settings(max_examples=300)
@given(problems(), st.integers(1, 4), st.integers(1, 3))
def test_few_units_treated_as_many_are_feasible_and_bounded(
    problem: tuple[np.ndarray, np.ndarray, int], gathered: int, chunk: int
) -> None:
    """Guards sample, bracket and margin on odd input. The sample may mislead and units outside the bracket
    are fixed, so the choice need not be optimal, but what is claimed of it must be true."""
    costs, sizes, budget = problem
    result = many(*one_block_each(costs, sizes), budget, gathered, chunk)
    optimum = brute_force(costs, sizes, budget)
    tolerance = 1e-7 * costs[np.isfinite(costs)].max() + 1e-12
    check(result, costs, sizes, budget)
    assert result.lower_bound <= optimum + tolerance
    assert result.dual_bound <= optimum * (1 + 1e-15)
    assert optimum <= result.objective + tolerance


@pytest.mark.parametrize("bits", [0.1, 2.0, 7.9])
@pytest.mark.parametrize(
    ("gathered", "chunk"), [(4_000, 999), (20_000, 1_000), (20_000, 19_999), (300, 20_000)]
)
def test_sampling_chunks_and_blocks_change_nothing(bits: float, gathered: int, chunk: int) -> None:
    """Guards the positions of units across edges of chunks and blocks (a block of one unit among them), and
    that the price does not depend on how its bracket was found."""
    costs, sizes = trained_like(20_000)
    budget = int(bits * 768 * len(costs))
    whole = allocate([costs], [sizes], budget)
    blocks = np.split(costs, [1, 1_000, 7_777])
    parts = many(blocks, [sizes] * 4, budget, gathered, chunk)
    assert parts.price == whole.price
    assert np.array_equal(parts.choice, whole.choice)
    assert parts.relative_gap <= 1e-6


def test_blocks_may_have_rows_of_different_length() -> None:
    """Guards the sizes of contested units, gathered from several blocks."""
    costs, sizes = trained_like(6_000)
    blocks, rows = np.split(costs, 3), [sizes, sizes // 2, sizes // 3]
    per_unit = np.repeat(rows, 2_000, axis=0)
    for gathered in (100, 10_000):
        result = many(blocks, rows, 5_000_000, gathered, 512)
        check(result, costs, per_unit, 5_000_000)
        assert result.relative_gap <= 1e-6


@pytest.mark.parametrize("gathered", [500, 10_000])
def test_float32_costs_are_summed_exactly(gathered: int) -> None:
    """Guards the certificate: against exact arithmetic on costs over 12 decades, of which float32 sums
    would lose the small ones. The dual bound lies below the exact dual at its price, and hardly below."""
    random = np.random.default_rng(2)
    costs = 10 ** random.uniform(-12, 0, size=(3_000, 1)) * 4.0 ** -np.array(ALL_WIDTHS)
    costs = (costs * random.uniform(0.7, 1.3, size=costs.shape)).astype(np.float32)
    sizes, budget = np.array(ALL_WIDTHS) * 768, 3_000 * 2 * 768
    result = many([costs], [sizes], budget, gathered, 700)
    exact = sum(Fraction(float(c)) for c in costs[np.arange(3_000), result.choice])
    price = Fraction(result.price)
    table = [[Fraction(float(c)) + price * int(s) for c, s in zip(row, sizes, strict=True)] for row in costs]
    bound = sum(map(min, table)) - price * budget
    assert Fraction(result.dual_bound) <= bound <= exact
    assert bound - Fraction(result.dual_bound) <= bound * Fraction(1e-12)
    assert result.objective == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.parametrize("gathered", [64, 10_000])
def test_equal_units_share_the_budget(gathered: int) -> None:
    """Guards against an endless search for a bracket: all units change their minds at one price, which no
    bracket can take apart, and half of them must be upgraded by hand."""
    costs = np.tile(np.array([4.0, 1.0, 0.25]), (1_000, 1))
    result = many([costs], [[0, 32, 64]], 1_000 * 32 + 500 * 32, gathered, 128)
    assert result.size == result.budget
    assert result.objective == pytest.approx(500 * 1.0 + 500 * 0.25, rel=1e-12)
    assert result.relative_gap <= 1e-9


@pytest.mark.parametrize("scale", [1e-290, 1e-150, 1e150, 1e290])
def test_costs_of_any_scale_are_chosen_alike(scale: float) -> None:
    """Guards the search for the price against products of prices that no float holds: it never ended."""
    costs, sizes = trained_like(300)
    wanted = allocate([costs], [sizes], 2 * 768 * 300)
    found = allocate([costs * scale], [sizes], 2 * 768 * 300)
    assert np.array_equal(found.choice, wanted.choice)
    assert found.relative_gap <= solve.CERTIFIED


def test_nan_forbids_a_choice_like_infinity() -> None:
    """Guards the dual against NaN, which would make every comparison of its unit false."""
    costs = np.array([[3.0, np.nan, 1.0], [3.0, 2.0, 1.0]])
    assert allocate([costs], [[0, 32, 64]], 96).choice.tolist() == [2, 1]
    with pytest.raises(QuantizationError, match="no allowed width"):
        allocate([np.full((1, 2), np.nan)], [[0, 32]], 96)


@pytest.mark.parametrize(
    ("costs", "sizes", "message"),
    [
        ([np.ones((2, 3))], [[0, 32]], r"\(2, 3\).*2 sizes"),
        ([np.ones((2, 2)), np.ones((2, 2))], [[0, 32]], "2 blocks"),
        ([], [], "0 blocks"),
        ([np.ones((0, 2))], [[0, 32]], "no units"),
        ([np.ones((2, 2))], [[32, 32]], "rise"),
    ],
)
def test_tables_that_do_not_fit_are_refused(costs: list, sizes: list, message: str) -> None:
    """Guards against broadcasting one layer's sizes over another's costs."""
    with pytest.raises(QuantizationError, match=message):
        allocate(costs, sizes, 1_000)
