"""The plan of a layer: what its rows cost, corrected by a trial; and how far a result is from the bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.allocation import rate_distortion
from bitsmoe_plugin.allocation.knapsack.solve import allocate
from bitsmoe_plugin.allocation.row_costs import row_costs
from bitsmoe_plugin.base.devices import computing_on
from bitsmoe_plugin.codec.layout import LayerShape, row_sizes
from bitsmoe_plugin.rounding.layer_rounding import round_experts
from bitsmoe_plugin.rounding.refit_down import Exact, exact, sampled_error
from bitsmoe_plugin.rounding.rounded_layer import RoundedLayer
from bitsmoe_plugin.spectral.bases import SharedBases
from bitsmoe_plugin.spectral.error_feedback import Feedback
from bitsmoe_plugin.spectral.layer_feedback import rank_feedback
from bitsmoe_plugin.spectral.layer_problem import LayerProblem
from bitsmoe_plugin.spectral.row_weights import RowWeights, row_weights

_TRIAL_EXPERTS = 8


@dataclass(frozen=True)
class LayerPlan:
    """Attributes:
    costs: ``[f, E, r, widths]`` float32, estimated output error of each row at each width. This and all
        else is on the CPU.
    energies: ``[f, E, r]`` float32, first-order output error of dropping each row.
    bases: quantized, to be reused when the layer is rounded.
    correction: measured over estimated error of a trial rounding; already inside ``costs``.
    output_energy: of the layer, see ``LayerProblem``.
    row_weights: if rounding needs no more than the plan, see ``BitsMoEConfig.rounds_as_planned``.
    """

    costs: Tensor
    energies: Tensor
    bases: SharedBases
    correction: float
    output_energy: float
    row_weights: RowWeights | None = None


def plan_layer(problem: LayerProblem, payload_bits: int) -> LayerPlan:
    """Costs of a layer, corrected by a trial rounding of some of its experts.

    The first-order estimate ranks rows well, but its sum is off by a factor that differs between
    layers. The trial measures it: allocate the layer alone, round, compare.

    Args:
        payload_bits: the layer's share of the budget, for the trial.
    """
    cpu, energy, config = torch.device("cpu"), problem.output_energy, problem.config
    with computing_on(problem.device):
        weights, correction = None, 1.0
        if config.cost == "spectral":
            costs, energies = row_costs(problem)
        elif config.cost == "model":
            weights = row_weights(problem, _trial_feedback(problem, _exact(problem)))
            costs, energies = row_costs(problem, weights)
        else:
            costs, energies, correction = _corrected_costs(problem, payload_bits)
    stored = weights.to(cpu) if weights is not None and config.rounds_as_planned else None
    return LayerPlan(
        costs=costs.to(cpu),
        energies=energies.to(cpu),
        bases=problem.bases.to(cpu),
        correction=correction,
        output_energy=energy,
        row_weights=stored,
    )


def _exact(problem: LayerProblem) -> dict[int, Exact]:
    """What some experts compute, evenly spaced."""
    return {expert: exact(problem, expert) for expert in trial_experts(problem.shape.num_experts)}


def trial_experts(experts: int) -> range:
    """Of so many those that a trial is of."""
    return range(0, experts, max(1, experts // _TRIAL_EXPERTS))


def _trial_feedback(problem: LayerProblem, given: dict[int, Exact]) -> dict[int, Feedback]:
    """Feedback of some experts, which tell what it does to the others'."""
    return {expert: rank_feedback(problem, expert, known.slot_weights) for expert, known in given.items()}


def _corrected_costs(problem: LayerProblem, payload_bits: int) -> tuple[Tensor, Tensor, float]:
    """Costs times the correction, energies, and the correction of a plan."""
    widths, given = problem.config.widths, _exact(problem)
    feedback, experts = _trial_feedback(problem, given), list(given)
    costs, energies = row_costs(problem, row_weights(problem, feedback))
    choice = _alone(costs, problem.shape, widths, payload_bits)
    bits = torch.tensor(widths, device=choice.device)[choice[:, experts]]
    rounded, _ = round_experts(problem, bits, experts, feedback, given, with_values=True)
    assert rounded.values is not None
    estimated = costs[:, experts].gather(-1, choice[:, experts, :, None]).sum()
    measured = sampled_error(problem, experts, rounded.values)
    correction = measured / float(estimated) if float(estimated) > 0 and measured > 0 else 1.0
    return costs * correction, energies, correction


def _alone(costs: Tensor, shape: LayerShape, widths: tuple[int, ...], payload_bits: int) -> Tensor:
    """``[f, E, r]`` int64: the width of each row if the layer is allocated alone."""
    sizes = row_sizes(shape, widths)
    least = costs.shape[:-1].numel() * sizes[0]
    found = allocate([costs.reshape(-1, len(widths)).cpu().numpy()], [sizes], max(payload_bits, least))
    return torch.from_numpy(found.choice).to(costs.device).long().view(costs.shape[:-1])


def expected_error(plan: LayerPlan, shape: LayerShape, widths: tuple[int, ...], payload_bits: int) -> float:
    """Output error of a layer whose rows may spend ``payload_bits``."""
    choice = _alone(plan.costs, shape, widths, payload_bits)
    return float(plan.costs.gather(-1, choice[..., None]).sum())


def bits_over_bound(
    plan: LayerPlan, rounded: RoundedLayer, shape: LayerShape, others: Tensor | None = None
) -> float:
    """Stored bits per weight of the rows beyond what the rate-distortion bound asks for.

    Both sides count the same first-order output error; the rows' bits are payload, row codes and
    scale grids, without the bases.

    Args:
        others: ``[E]`` bool, experts that have rows; default: all.
    """
    energies, errors = plan.energies, rounded.errors
    if others is not None:
        energies, errors = energies[:, others], errors[:, others]
    least = rate_distortion.water_filling_bits(energies, float(errors.sum()), shape.intermediate_size)
    stored = 32 * rounded.packed.payload.numel()
    for tensor in (rounded.packed.row_codes, rounded.packed.scale_grid):
        stored += 8 * tensor.numel() * tensor.element_size()
    return (stored - least) / shape.weights
