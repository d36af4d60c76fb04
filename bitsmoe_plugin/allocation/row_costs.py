"""What the rows of a layer's factors cost at every width, to first order in their rounding errors."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.activations import drawn_by_weight
from bitsmoe_plugin.codec import row_codec, uniform
from bitsmoe_plugin.spectral.bases import all_factors, expert_ids
from bitsmoe_plugin.spectral.layer_problem import LayerProblem
from bitsmoe_plugin.spectral.row_weights import RowWeights

GATE_UP_WEIGHT = 2.0
"""Gate and up errors count double in the allocation. Their first-order cost is too low by 1.5 to
2.9 (measured on the bundled model at 2 bits, gate and up replaced alone) because it ignores that a
neuron's error is largest on the tokens that excite it, and that errors of neurons add up coherently."""

DROP_WEIGHT = 2.5
"""A dropped gate or up row costs this much more again: its error is the row itself, so it always
points along what excites the neuron. KL to full precision of the bundled model at 2 bits (32,768
calibration tokens): 0.0334 at 1, 0.0303 at 1.5, 0.0287 at 2.5, 0.0288 at 4."""

_NEURONS = {"output": 384, "model": 128}
"""Of an expert with more, that costs are learnt from, drawn by what they add to energies on average. (A layer
of random experts of 768 neurons at 2 bits, std of the logarithm of neurons' sizes 0 and 0.5, two seeds: 0.2
to 0.9 % more error than with all; "model", which needs energies alone, 0.1 to 0.4 %. Evenly spaced ones miss
rows that are large at few: SmolLM2 cut into experts of 768, "model" had a KL of 3.39, with this 1.43.)"""


def _spectral_weights(problem: LayerProblem, chosen: slice) -> tuple[Tensor, Tensor]:
    """As ``RowWeights.of``, for ``cost="spectral"``: the energy of what the factor is multiplied with.

    ``row_costs`` takes errors relative to each projection's total, the only common unit there is.
    """
    energies = []
    for tokens in problem.sampled[chosen]:
        z = problem.z[:, tokens.tokens]
        energies.append((z.square() * tokens.weights[:, None]).sum(1))
    z_energy = torch.stack(energies, 1)
    assert problem.hidden_moments is not None, "of a layer that is planned"
    hidden = problem.hidden_moments.energy[chosen, None].expand(-1, problem.shape.rank)
    shape = problem.shape
    ones = torch.ones(len(shape.factors), len(hidden), shape.intermediate_size, device=problem.device)
    return ones, torch.stack([*z_energy.expand(shape.inputs, -1, -1), hidden])


@span("costs")
def row_costs(problem: LayerProblem, own: RowWeights | None = None) -> tuple[Tensor, Tensor]:
    """What the rows of a layer cost at every width.

    Args:
        own: weights of the rows; needed unless ``cost="spectral"``.

    Returns:
        costs ``[f, E, r, widths]`` and energies ``[f, E, r]`` float32: estimated output error of
        each row, and the first-order error of dropping it.
    """
    config, shape, size = problem.config, problem.shape, problem.shape.intermediate_size
    energies = torch.empty(len(shape.factors), shape.num_experts, shape.rank, device=problem.device)
    costs = torch.empty(*energies.shape, len(config.widths), device=problem.device)
    for chosen in problem.chunks(shape.num_experts):
        if own is None:
            inner, outer = _spectral_weights(problem, chosen)
        else:
            inner, outer = own.of(chosen, problem.output_basis)
        neurons = None
        if size > _NEURONS.get(config.cost, size):
            neurons, inner = _drawn_neurons(problem, chosen, inner, _NEURONS[config.cost])
        inner = inner[:, :, None]
        factors = all_factors(problem.weights, problem.inverses, chosen, neurons)
        for factor, rows in enumerate(factors):
            energy = (rows.square() * inner[factor]).sum(-1) * outer[factor]
            energies[factor, chosen] = energy
            for index, width in enumerate(config.widths):
                if config.cost == "model":
                    distortion = energy * row_codec.gaussian_distortion(
                        width, config.grid, shape.intermediate_size
                    )
                else:
                    distortion = uniform.best_scale(rows, inner[factor], width)[1] * outer[factor]
                    distortion *= row_codec.expected_gain(width, config.grid, size)
                if factor < shape.inputs and own is not None:
                    distortion *= GATE_UP_WEIGHT * (DROP_WEIGHT if width == 0 else 1.0)
                costs[factor, chosen, :, index] = distortion
    if own is None:  # what a projection's factor is multiplied with has a unit of its own
        totals = energies.sum((1, 2), keepdim=True).clamp_min(1e-30)
        costs /= totals[..., None]
    return costs, energies


def _drawn_neurons(problem: LayerProblem, chosen: slice, inner: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Positions ``[f, e, most]`` int64 of neurons, and weights for them that stand for those of all.

    Args:
        inner: ``[f, e, I]``, weights of all; where fewer than ``most`` are drawn, the rest weighs nothing.
    """
    sizes = inner * _squared_norms(problem, chosen)
    neurons = torch.zeros(*sizes.shape[:2], most, dtype=torch.int64, device=sizes.device)
    weights = torch.zeros(*sizes.shape[:2], most, device=sizes.device)
    for e, expert in enumerate(expert_ids(problem.weights, chosen)):
        for f, size in enumerate(sizes[:, e]):
            found, raised = drawn_by_weight(size, most, problem.config.seed + expert)
            neurons[f, e, : len(found)] = found
            weights[f, e, : len(found)] = inner[f, e, found] * (raised / size[found].clamp_min(1e-30))
    return neurons, weights


def _squared_norms(problem: LayerProblem, chosen: slice) -> Tensor:
    """Of the rows of gate and up and of the columns of down, ``[f, e, I]`` float32."""
    matrices = [*(w[chosen] for w in problem.weights.inputs), problem.weights.down[chosen].transpose(1, 2)]
    return torch.stack([torch.stack([m.float().square().sum(-1) for m in factor]) for factor in matrices])
