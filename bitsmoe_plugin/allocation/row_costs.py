"""What the rows of a layer's factors cost at every width, to first order in their rounding errors."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.codec import row_codec, uniform
from bitsmoe_plugin.spectral.bases import all_factors
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

_ENERGY_NEURONS = 256
"""Neurons of an expert, evenly spaced, that energies are learnt from where rows are taken for Gaussian: their
standard deviation is then 9 %. KL rises with its square (examples/speed.md): by 2 %."""


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
    stride = max(1, size // _ENERGY_NEURONS) if config.cost == "model" else 1
    seen = problem.weights.every(stride)
    for chosen in problem.chunks(shape.num_experts):
        if own is None:
            inner, outer = _spectral_weights(problem, chosen)
        else:
            inner, outer = own.of(chosen, problem.output_basis)
        inner = inner[:, :, None]
        factors = all_factors(seen, problem.inverses, chosen)
        for factor, rows in enumerate(factors):
            energy = _energies(rows, inner[factor], stride) * outer[factor]
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


def _energies(rows: Tensor, weights: Tensor, stride: int) -> Tensor:
    """Weighted energies ``[e, r]`` of rows of which ``rows`` ``[e, r, n]`` has every ``stride``-th value.

    Args:
        weights: ``[e, 1, I]``, of all values.
    """
    own = weights[..., ::stride]
    energies = (rows.square() * own).sum(-1)
    return energies if stride == 1 else energies * (weights.sum(-1) / own.sum(-1).clamp_min(1e-30))
