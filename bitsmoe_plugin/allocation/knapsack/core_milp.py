"""The core of an allocation as an integer program for HiGHS."""

from __future__ import annotations

import highspy
import numpy as np

from bitsmoe_plugin.allocation.knapsack.tables import Floats, Ints
from bitsmoe_plugin.base.stdout import stdout_to_stderr

_HIGHS_OPTIONS = {
    "output_flag": False,
    "threads": 1,
    "random_seed": 0,
    "mip_rel_gap": 0.0,
    "mip_max_nodes": 4_000,  # not a time limit: the result must not depend on the machine's speed
}


def solve_core(costs: Floats, sizes: Ints, budget: int, gap: float) -> tuple[Ints, float] | None:
    """HiGHS on a small multiple-choice knapsack.

    Args:
        costs: ``[units, widths]`` float64; inf forbids a choice.
        sizes: ``[units, widths]`` int64.
        budget: bits that all choices together may take.
        gap: cost by which a choice may exceed the lower bound and end the search.

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
    solver.setOptionValue("mip_abs_gap", gap / scale)
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
