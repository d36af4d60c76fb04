"""The Lagrangian dual of the allocation: one price per bit, at which every unit chooses for itself.

The higher the price, the fewer bits are taken. The smallest price at which the choices fit the budget
is found by bisection; units that choose alike at both ends of the bracket choose so everywhere inside
(the least of linear functions of the price is concave), so only contested units are looked at again.
Of many units, a sample tells where the bracket must be, and a pass over all proves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitsmoe_plugin.allocation.knapsack.tables import Choices, CostTables, Floats, Ints, Units
from bitsmoe_plugin.errors import QuantizationError

GATHERED = 2**20
"""Units whose tables are copied out (128 bytes each); more are sampled and bracketed first."""
SAMPLED = 2**19
"""Of 37.7 million units so many give the price to about 0.3 %."""
_SPREAD = 1.01
_PRECISION = 1 + 1e-12
_LOWEST = 1e-40
"""Lowest price that is looked at, relative to the highest."""
_ROUNDING = 2.0**-48
"""Bound on the relative error of float64 sums over a chunk of positive numbers, each the result of two
roundings. numpy adds up 128 numbers in 8 strands, then pairs: in a chunk of 2**14 no number passes more than
16 + 3 + 7 additions, so it errs by less than 2**-53 * 28."""


@dataclass(frozen=True)
class Survey:
    """Attributes:
    smallest: fewest bits that any allowed choice takes.
    unpriced: bits of the cheapest choices when bits cost nothing.
    highest: largest finite cost; at this price per bit every unit takes its smallest choice.
    """

    smallest: int
    unpriced: int
    highest: float


def survey(tables: CostTables) -> Survey:
    """What must be known before a price is looked for.

    Raises:
        QuantizationError: a unit has no allowed choice.
    """

    def look(units: Units, _: slice) -> tuple[bool, int, int, float]:
        finite = np.isfinite(units.costs)
        allowed = bool(finite.any(axis=0).all())
        if not allowed:
            return False, 0, 0, 0.0
        smallest = units.size(finite.argmax(axis=0).astype(np.uint8))
        unpriced = units.size(units.choose(0.0)[0])
        return True, smallest, unpriced, float(units.costs.max(where=finite, initial=0.0))

    allowed, smallest, unpriced, highest = zip(*tables.map(look), strict=True)
    if not all(allowed):
        raise QuantizationError("a row has no allowed width: all of its costs are infinite or NaN")
    return Survey(sum(smallest), sum(unpriced), max(*highest, 1e-300))


@dataclass(frozen=True)
class Contest:
    """The units that choose differently at the ends of a bracket of prices around the right one.

    Attributes:
        positions: ``[n]`` int64, rising, of these units among all.
        units: their tables.
        low, high: the bracket; choices at ``low`` exceed the budget, those at ``high`` fit.
        price: smallest price, to 1e-12, at which the choices of all units fit.
        step: least difference of two sizes of a unit; infinite if there are no other units.
    """

    positions: Ints
    units: Units
    low: float
    high: float
    price: float
    step: float

    def margin(self, price: float) -> float:
        """What any other choice of any unit outside the contest costs more in the dual, at least.

        Such a unit keeps its choice from ``low`` to ``high``, so a choice of d bits more costs at least
        d (price - low) more at the price, and one of d bits less at least d (high - price).
        """
        return math.inf if self.step == math.inf else self.step * min(price - self.low, self.high - price)


def contest(tables: CostTables, budget: int, highest: float) -> Contest:
    """Find the price and the units that may still change.

    Args:
        budget: less than ``Survey.unpriced``, at least ``Survey.smallest``.
        highest: of the survey.
    """
    if tables.units <= GATHERED:
        positions = np.arange(tables.units)
        units = tables.gather(positions)
        return Contest(
            positions=positions,
            units=units,
            low=0.0,
            high=highest,
            price=_bisect(units, budget, 0.0, highest, highest),
            step=math.inf,
        )
    low, high, taken, positions = _bracket(tables, budget, highest)
    units = tables.gather(positions)
    others = taken - units.size(units.choose(high)[0])
    price = _bisect(units, budget - others, low, high, highest)
    return Contest(
        positions=positions,
        units=units,
        low=low,
        high=high,
        price=price,
        step=float(np.diff(tables.sizes, axis=1).min()),
    )


def _compare(tables: CostTables, low: float, high: float) -> tuple[int, int, Ints]:
    """Sizes of all choices at two prices, and the positions of the units that choose differently."""

    def look(units: Units, positions: slice) -> tuple[int, int, Ints]:
        at_low, at_high = units.choose(low)[0], units.choose(high)[0]
        return units.size(at_low), units.size(at_high), np.flatnonzero(at_low != at_high) + positions.start

    low_sizes, high_sizes, positions = zip(*tables.map(look), strict=True)
    return sum(low_sizes), sum(high_sizes), np.concatenate(positions)


def _bracket(tables: CostTables, budget: int, highest: float) -> tuple[float, float, int, Ints]:
    """Prices close around the right one, starting from a sample's.

    Returns:
        low and high as in ``Contest``, the size of all choices at ``high``, the contested positions: at
        most ``GATHERED`` of them unless more have the same slope.
    """
    sample = tables.gather(np.arange(0, tables.units, -(-tables.units // SAMPLED)))
    centre = _bisect(sample, budget * len(sample) // tables.units, 0.0, highest, highest)
    spread, low, high = _SPREAD, 0.0, highest  # low and high: proven so far
    while True:
        below, above = max(low, centre / spread), min(high, centre * spread)
        at_below, at_above, positions = _compare(tables, below, above)
        if at_below <= budget:
            high = centre = below
            spread = min(spread**4, 1e60)
        elif at_above > budget:
            low = centre = above
            spread = min(spread**4, 1e60)
        elif len(positions) <= GATHERED or above <= below * _PRECISION:
            return below, above, at_above, positions
        else:  # try the middle half of the bracket
            low, high = below, above
            least = max(low, highest * _LOWEST)
            centre, spread = _between(least, high), (high / least) ** 0.25


def _between(low: float, high: float) -> float:
    """The geometric mean, also where the product is beyond what a float holds."""
    product = low * high
    if np.finfo(float).tiny <= product < math.inf:
        return math.sqrt(product)
    return math.sqrt(low) * math.sqrt(high)


def _bisect(units: Units, budget: int, fails: float, fits: float, highest: float) -> float:
    """Smallest price, to float precision, at which choices fit the budget.

    Halves (in the logarithm) the same interval whatever bracket is known, so the price found does not
    depend on how the bracket was come by.

    Args:
        fails, fits: prices at which the choices are known to exceed and to fit the budget.
        highest: upper end of the interval.
    """
    low, high = max(highest * _LOWEST, np.finfo(float).tiny), highest
    at_fails, at_fits = units.choose(fails)[0], units.choose(fits)[0]
    while high > low * _PRECISION:
        middle = _between(low, high)
        if fails < middle < fits:
            at_middle = units.choose(middle)[0]
            if units.size(at_middle) <= budget:
                fits, at_fits = middle, at_middle
            else:
                fails, at_fails = middle, at_middle
            contested = at_fails != at_fits
            if 2 * int(contested.sum()) <= len(units):
                budget -= units.pick(~contested).size(at_fits[~contested])
                units, at_fails, at_fits = units.pick(contested), at_fails[contested], at_fits[contested]
        if middle >= fits:
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class DualSolution:
    """Attributes:
    price: per bit.
    choice: ``[units]`` uint8, of least cost at the price.
    cost: of the choice, without price.
    size: of the choice, in bits.
    slack: what the choice costs at the price beyond the least (ties are broken towards small).
    least: least cost at the price, sizes included.
    """

    price: float
    choice: Choices
    cost: float
    size: int
    slack: float
    least: float

    def bound(self, budget: int) -> float:
        """No choice within a budget costs less: the Lagrangian dual, less what rounding may have added."""
        unspent = self.price * (budget - self.size)
        return self.cost - self.slack - unspent - _ROUNDING * (self.least + abs(unspent))


def solve(tables: CostTables, price: float) -> DualSolution:
    """Every unit's choice at a price."""
    choice = np.empty(tables.units, dtype=np.uint8)

    def look(units: Units, positions: slice) -> tuple[float, int, float, float]:
        choice[positions], least = units.choose(price)
        costs, sizes = units.take(choice[positions])
        slack = costs + price * sizes - least
        return float(costs.sum()), int(sizes.sum()), float(slack.sum()), float(least.sum())

    cost, size, slack, least = zip(*tables.map(look), strict=True)
    return DualSolution(
        price=price,
        choice=choice,
        cost=math.fsum(cost),
        size=sum(size),
        slack=math.fsum(slack),
        least=math.fsum(least),
    )


def solve_within(tables: CostTables, price: float, budget: int) -> DualSolution:
    """Every unit's choice at a price, or at one higher by some 1e-12 if rounding of tied costs demands it."""
    solution, raised = solve(tables, price), _PRECISION
    while solution.size > budget:
        solution, raised = solve(tables, price * raised), raised**2
    return solution


def total(tables: CostTables, choice: Choices) -> tuple[float, int]:
    """Cost and size of any choice ``[units]``."""
    cost, size = zip(*tables.map(lambda units, positions: _sums(*units.take(choice[positions]))), strict=True)
    return math.fsum(cost), sum(size)


def _sums(costs: Floats, sizes: Ints) -> tuple[float, int]:
    return float(costs.sum()), int(sizes.sum())
