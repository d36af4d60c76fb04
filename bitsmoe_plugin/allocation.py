"""Which width each row gets: min sum of costs subject to a budget of payload bits.

A unit is one row of one factor of one expert; it takes exactly one of the allowed widths. This is
a multiple-choice knapsack. Its Lagrangian dual bounds the optimum from below; a dual value that
is feasible after rounding bounds it from above; every choice whose reduced cost exceeds the gap
between the two cannot be in an optimal solution (Dyer, Kayal, Walker, 1984) and is fixed. HiGHS
solves what remains (the core) as an integer program.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.streams import stdout_to_stderr

_HIGHS_OPTIONS = {
    "output_flag": False,
    "threads": 1,
    "random_seed": 0,
    "mip_rel_gap": 1e-9,
    "mip_abs_gap": 1e-12,
    "mip_max_nodes": 20_000,  # not a time limit: the result must not depend on the machine's speed
}

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CORE_COLUMNS = 20_000
"""Largest integer program handed to HiGHS; choices beyond it are fixed by reduced cost."""


@dataclass(frozen=True)
class Allocation:
    """Attributes:
    choice: ``[units]`` int64, index into the widths.
    objective: cost of the choice.
    lower_bound: no choice within the budget costs less (dual bound).
    size: bits used by the choice.
    budget: bits allowed.
    core_units: units that HiGHS decided.
    price: cost per bit at the optimum of the dual (the Lagrange multiplier).
    """

    choice: Ints
    objective: float
    lower_bound: float
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


def _choose(costs: Floats, sizes: Ints, price: float) -> Ints:
    """Cheapest choice per unit at a price per bit; of equally cheap ones the smallest."""
    reduced = costs + price * sizes
    best = reduced.min(axis=1, keepdims=True)
    tied = reduced <= best * (1 + 1e-12)
    return np.where(tied, sizes, np.iinfo(np.int64).max).argmin(axis=1)


def _take(table: NDArray, choice: Ints) -> NDArray:
    return np.take_along_axis(table, choice[:, None], axis=1)[:, 0]


def _dual_price(costs: Floats, sizes: Ints, budget: int) -> float:
    """Smallest price per bit (to float precision) at which the cheapest choices fit the budget."""
    if int(_take(sizes, _choose(costs, sizes, 0.0)).sum()) <= budget:
        return 0.0
    finite = costs[np.isfinite(costs)]
    high = max(float(finite.max()), 1e-300)
    while int(_take(sizes, _choose(costs, sizes, high)).sum()) > budget:
        high *= 1e3
    low = high * 1e-40
    for _ in range(200):
        middle = float(np.sqrt(low * high))
        if int(_take(sizes, _choose(costs, sizes, middle)).sum()) <= budget:
            high = middle
        else:
            low = middle
        if high / low < 1 + 1e-12:
            break
    return high


def _fill(costs: Floats, sizes: Ints, choice: Ints, budget: int) -> Ints:
    """Spend what is left of the budget on the upgrades that gain most per bit."""
    choice = choice.copy()
    left = budget - int(_take(sizes, choice).sum())
    gain = _take(costs, choice)[:, None] - np.where(np.isfinite(costs), costs, np.finfo(float).max)
    extra = sizes - _take(sizes, choice)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where((extra > 0) & (extra <= left) & (gain > 0), gain / extra, 0.0)
    best = rate.argmax(axis=1)
    order = np.argsort(-rate.max(axis=1), kind="stable")
    for unit in order[: 4 * CORE_COLUMNS]:
        width = best[unit]
        if rate[unit, width] <= 0:
            break
        if extra[unit, width] <= left:
            choice[unit] = width
            left -= int(extra[unit, width])
    return choice


def _solve_core(costs: Floats, sizes: Ints, budget: int) -> tuple[Ints, float] | None:
    """HiGHS on a small multiple-choice knapsack.

    Returns:
        choice per unit and a lower bound of the optimum; None if nothing feasible was found.
    """
    usable = np.isfinite(costs)
    unit_of, width_of = np.nonzero(usable)
    scale = float(np.abs(costs[usable]).max()) or 1.0
    with stdout_to_stderr():  # the first solver of a process prints a banner, whatever its options
        solver = highspy.Highs()
    for option, setting in _HIGHS_OPTIONS.items():
        solver.setOptionValue(option, setting)
    solver.passModel(_core_model(costs[usable] / scale, sizes[usable], unit_of, len(costs), budget))
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != 2:  # kSolutionStatusFeasible
        return None
    taken = np.zeros(costs.shape)
    taken[unit_of, width_of] = solver.getSolution().col_value
    return taken.argmax(axis=1), info.mip_dual_bound * scale


def _core_model(costs: Floats, sizes: Ints, unit_of: Ints, units: int, budget: int) -> highspy.HighsLp:
    """min costs x, one choice per unit, sizes x <= budget, x binary; one column per usable choice."""
    columns = len(costs)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, units + 1
    model.col_cost_ = costs
    model.col_lower_, model.col_upper_ = np.zeros(columns), np.ones(columns)
    model.row_lower_ = np.append(np.ones(units), -highspy.kHighsInf)
    model.row_upper_ = np.append(np.ones(units), float(budget))
    model.integrality_ = [highspy.HighsVarType.kInteger] * columns
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.arange(0, 2 * columns + 1, 2, dtype=np.int32)
    model.a_matrix_.index_ = np.stack([unit_of, np.full(columns, units)], 1).ravel().astype(np.int32)
    model.a_matrix_.value_ = np.stack([np.ones(columns), sizes.astype(float)], 1).ravel()
    return model


def smallest_size(sizes: Ints, costs: Floats) -> int:
    """Fewest bits any allowed choice takes.

    Raises:
        QuantizationError: a unit has no allowed choice.
    """
    if not bool(np.isfinite(costs).any(axis=1).all()):
        raise QuantizationError("a row has no allowed width: all of its costs are infinite or NaN")
    return int(np.where(np.isfinite(costs), sizes, np.iinfo(np.int64).max).min(axis=1).sum())


def _core_units(slack: Floats, open_choice: NDArray[np.bool_]) -> Ints:
    """Units with more than one open choice, the most contested ones if HiGHS could not take all."""
    contested = np.flatnonzero(open_choice.sum(axis=1) > 1)
    if not len(contested):
        return contested
    second = np.partition(slack[contested], 1, axis=1)[:, 1]
    kept = contested[np.argsort(second, kind="stable")]
    columns = np.cumsum(open_choice[kept].sum(axis=1))
    return np.sort(kept[columns <= CORE_COLUMNS])


def allocate(costs: Floats, sizes: Ints, budget: int) -> Allocation:
    """Choose one width per unit.

    Args:
        costs: ``[units, widths]`` float64, >= 0; inf forbids a choice.
        sizes: ``[units, widths]`` int64, bits that a choice stores.
        budget: bits that all choices together may store.

    Raises:
        QuantizationError: not even the smallest choices fit.
    """
    least = smallest_size(sizes, costs)
    if least > budget:
        raise QuantizationError(f"budget of {budget} payload bits is below the smallest, {least}")
    # What is no multiple of the sizes' common divisor cannot be spent and would loosen the bound.
    spendable = budget - budget % max(1, int(np.gcd.reduce(sizes, axis=None)))
    price = _dual_price(costs, sizes, spendable)
    dual = _choose(costs, sizes, price)
    reduced = costs + price * sizes
    cheapest = _take(reduced, dual)
    lower = float(cheapest.sum() - price * spendable)
    incumbent = _fill(costs, sizes, dual, spendable)
    upper = float(_take(costs, incumbent).sum())
    # A choice that costs more than this in the dual cannot be in a better solution than the incumbent.
    open_choice = reduced - cheapest[:, None] <= (upper - lower) * (1 + 1e-9)
    core = _core_units(reduced - cheapest[:, None], open_choice)
    if price > 0 and len(core):
        outside = np.ones(len(costs), dtype=bool)
        outside[core] = False
        complete = not bool((open_choice[outside].sum(axis=1) > 1).any())
        room = spendable - int(_take(sizes, dual)[outside].sum())
        solved = _solve_core(np.where(open_choice[core], costs[core], np.inf), sizes[core], room)
        if solved is not None:
            candidate = dual.copy()
            candidate[core], bound = solved
            cost = float(_take(costs, candidate).sum())
            if cost <= upper and int(_take(sizes, candidate).sum()) <= spendable:
                incumbent, upper = candidate, cost
            if complete:
                lower = max(lower, min(upper, bound + float(_take(costs, dual)[outside].sum())))
    return Allocation(
        choice=incumbent,
        objective=upper,
        lower_bound=lower,
        size=int(_take(sizes, incumbent).sum()),
        budget=budget,
        core_units=len(core) if price > 0 else 0,
        price=price,
    )
