"""Which width each row gets: min sum of costs subject to a budget of payload bits.

A unit is one row of one factor of one expert; it takes exactly one of the allowed widths. This is
a multiple-choice knapsack. Its Lagrangian dual (``dual``) bounds the optimum from below; a dual
solution that is filled up to the budget bounds it from above; every choice whose reduced cost exceeds
the gap between the two cannot be in an optimal solution (Dyer, Kayal, Walker, 1984) and is fixed.
HiGHS solves what remains (the core) as an integer program (``core_milp``), unless the filled solution is
certified already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitsmoe_plugin.allocation.knapsack import dual
from bitsmoe_plugin.allocation.knapsack.core_milp import solve_core
from bitsmoe_plugin.allocation.knapsack.dual import Contest, DualSolution
from bitsmoe_plugin.allocation.knapsack.tables import Choices, Costs, CostTables, Ints, Units
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.errors import QuantizationError

CORE_COLUMNS = 20_000
"""Largest integer program handed to HiGHS; choices beyond it are fixed by reduced cost."""

CERTIFIED = 1e-5
"""Relative gap at which a choice counts as proven: costs are estimates, and one in 100,000 is far below what
they are good for. (One to four layers of 32 experts, 1.6 to 3 bits, are filled to 1e-14 to 1e-10; beside a
few large blocks, as linear layers are, the last proof alone took HiGHS minutes.)"""

Sizes = Sequence[Sequence[int] | Ints]


@dataclass(frozen=True)
class Allocation:
    """Attributes:
    choice: ``[units]`` uint8, index into the widths, block after block.
    objective: cost of the choice.
    lower_bound: no choice within the budget costs less; HiGHS, if it raised this bound above the dual's,
        computes to 1e-6 of the largest cost in the core.
    dual_bound: the same from the Lagrangian dual alone, less all rounding errors of its computation.
    size: bits used by the choice.
    budget: bits allowed.
    core_units: units that HiGHS decided.
    price: cost per bit at the optimum of the dual (the Lagrange multiplier).
    """

    choice: Choices
    objective: float
    lower_bound: float
    dual_bound: float
    size: int
    budget: int
    core_units: int
    price: float

    @property
    def relative_gap(self) -> float:
        """(objective - lower_bound) / objective; 0 means proven optimal."""
        if self.objective <= 0:
            return 0.0
        return max(0.0, (self.objective - self.lower_bound) / self.objective)


def smallest_size(costs: Sequence[Costs], sizes: Sizes) -> int:
    """Fewest bits any allowed choice takes; arguments as of ``allocate``.

    Raises:
        QuantizationError: a unit has no allowed choice.
    """
    return dual.survey(CostTables(costs, sizes)).smallest


def _fill(units: Units, choice: Choices, left: int) -> Choices:
    """Spend ``left`` bits on the upgrades that gain most per bit."""
    choice = choice.copy()
    cost, size = units.take(choice)
    gain = cost - np.where(np.isfinite(units.costs), units.costs, np.finfo(float).max)
    extra = units.sizes - size
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where((extra > 0) & (extra <= left) & (gain > 0), gain / extra, 0.0)
    best = rate.argmax(axis=0).astype(np.uint8)
    rate = rate.max(axis=0)
    extra = np.take_along_axis(extra, best[None].astype(np.intp), 0)[0]
    order = np.argsort(-rate, kind="stable")[: int((rate > 0).sum())]
    fitting = int(np.searchsorted(np.cumsum(extra[order]), left, side="right"))
    choice[order[:fitting]] = best[order[:fitting]]
    left -= int(extra[order[:fitting]].sum())
    for unit in order[fitting : fitting + 4 * CORE_COLUMNS]:
        if extra[unit] <= left:
            choice[unit] = best[unit]
            left -= int(extra[unit])
    return choice


@dataclass(frozen=True)
class _Core:
    """Attributes:
    chosen: ``[n]`` int64, the core among the contested units.
    allowed: ``[n, widths]`` bool, choices that may be in a better solution.
    complete: no unit outside the core has more than one such choice.
    """

    chosen: Ints
    allowed: np.ndarray
    complete: bool


def _find_core(contest: Contest, price: float, gap: float) -> _Core:
    """Units with more than one open choice, the most contested ones if HiGHS could not take all.

    A choice that costs more than the gap in the dual cannot be in a better solution than the incumbent.
    """
    gap *= 1 + 1e-9
    units = contest.units
    choice, least = units.choose(price)
    slack = units.costs + price * units.sizes - least
    allowed = slack <= gap
    allowed[choice, np.arange(len(units))] = True  # its slack may be that of a tie
    several = np.flatnonzero(allowed.sum(axis=0) > 1)
    second = np.sort(slack[:, several], axis=0)[1]  # NaN comes last
    taken = several[np.argsort(second, kind="stable")]
    taken = taken[np.cumsum(allowed[:, taken].sum(axis=0)) <= CORE_COLUMNS]
    complete = len(taken) == len(several) and gap < contest.margin(price)
    taken.sort()
    return _Core(taken, allowed[:, taken].T, complete)


def _improve(
    contest: Contest, solution: DualSolution, core: _Core, budget: int, gap: float
) -> tuple[Choices, float | None] | None:
    """The dual solution with the core decided by HiGHS.

    Returns:
        choice of the contested units, and a lower bound of the optimum if the core is complete; None if
        HiGHS found nothing.
    """
    choice = solution.choice[contest.positions]
    units = contest.units.pick(core.chosen)
    costs, sizes = units.take(choice[core.chosen])
    room = budget - (solution.size - int(sizes.sum()))
    table = np.ascontiguousarray(units.costs.T)
    allowed = np.where(core.allowed, table, np.inf)
    solved = solve_core(allowed, np.ascontiguousarray(units.sizes.T), room, gap)
    if solved is None:
        return None
    choice[core.chosen], bound = solved
    return choice, bound + solution.cost - float(costs.sum()) if core.complete else None


@span("allocation")
def allocate(costs: Sequence[Costs], sizes: Sizes, budget: int) -> Allocation:
    """Choose one width per unit.

    Args:
        costs: for each block of units (a layer) ``[units, widths]`` float32 or float64, >= 0; inf or NaN
            forbids a choice. Not copied.
        sizes: for each block ``[widths]``, bits that a choice stores, rising.
        budget: bits that all choices together may store.

    Raises:
        QuantizationError: not even the smallest choices fit, or a unit has no allowed choice.
    """
    tables = CostTables(costs, sizes)
    known = dual.survey(tables)
    if known.smallest > budget:
        raise QuantizationError(f"budget of {budget} payload bits is below the smallest, {known.smallest}")
    # What is no multiple of the sizes' common divisor cannot be spent and would loosen the bound.
    spendable = budget - budget % max(1, int(np.gcd.reduce(tables.sizes, axis=None)))
    if known.unpriced <= spendable:
        free = dual.solve(tables, 0.0)
        least = free.cost - free.slack
        return Allocation(
            choice=free.choice,
            objective=free.cost,
            lower_bound=least,
            dual_bound=free.bound(free.size),
            size=free.size,
            budget=budget,
            core_units=0,
            price=0.0,
        )
    contest = dual.contest(tables, spendable, known.highest)
    solution = dual.solve_within(tables, contest.price, spendable)
    proven = solution.bound(spendable)
    choice, there = solution.choice.copy(), contest.positions
    choice[there] = _fill(contest.units, choice[there], spendable - solution.size)
    objective, size = dual.total(tables, choice)
    lower, decided = proven, 0
    if objective - proven > CERTIFIED * objective:
        core = _find_core(contest, solution.price, objective - proven)
        decided = len(core.chosen)
        improved = _improve(contest, solution, core, spendable, CERTIFIED * objective) if decided else None
        if improved is not None:
            candidate = solution.choice.copy()
            candidate[there], bound = improved
            cost, taken = dual.total(tables, candidate)
            if cost <= objective and taken <= spendable:
                choice, objective, size = candidate, cost, taken
            if bound is not None:
                lower = max(lower, min(objective, bound))
    return Allocation(
        choice=choice,
        objective=objective,
        lower_bound=lower,
        dual_bound=proven,
        size=size,
        budget=budget,
        core_units=decided,
        price=solution.price,
    )
