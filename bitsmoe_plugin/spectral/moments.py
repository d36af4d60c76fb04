"""Second moments of neurons, outputs and inputs, from the weights and statistics of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import product, second_moment, symmetric_product
from bitsmoe_plugin.calibration.statistics import ExpertTokens, LayerStatistics
from bitsmoe_plugin.models.expert_weights import ExpertWeights

_TOGETHER = 8
"""Experts whose products are taken as one."""

_NEURONS_PER_DIMENSION = 24
"""Neurons for each dimension of the input that bases are learnt from; experts beyond are passed over, evenly.
Half of the bundled model's experts, 12 neurons per dimension, gave the same KL as all (0.0202, 0.0203)."""


@dataclass(frozen=True)
class BasisMoments:
    """What the bases of a layer are the principal directions of.

    Attributes:
        gram: ``[n, H, H]`` float64, of gate and up, or up: sum over experts and neurons of weight * w w^T.
        output: ``[H, H]`` float64, E[sum_e a y_e y_e^T] of the experts' outputs.
    """

    gram: Tensor
    output: Tensor


def basis_moments(
    weights: ExpertWeights, statistics: LayerStatistics, neuron_weighting: bool = True
) -> BasisMoments:
    """Sums over the experts of a layer, or over so many of them as tell its principal directions.

    Args:
        neuron_weighting: if not, all neurons of gate and up weigh alike.
    """
    h = weights.hidden_size
    stride = max(1, weights.num_experts * weights.intermediate_size // (_NEURONS_PER_DIMENSION * h))
    gram = torch.zeros(len(weights.inputs), h, h, dtype=torch.float64, device=weights.up.device)
    output = torch.zeros_like(gram[0])
    for first in range(0, weights.num_experts, _TOGETHER * stride):
        some = slice(first, first + _TOGETHER * stride, stride)
        for part, matrices in enumerate(weights.inputs):
            rows = matrices[some].float().flatten(0, 1)
            share = statistics.neuron_weights[part, some].flatten()
            gram[part] += second_moment(rows, share if neuron_weighting else torch.ones_like(share))
        down = [matrix.float() for matrix in weights.down[some]]
        moments = [product(*pair) for pair in zip(down, statistics.hidden_moment[some], strict=True)]
        output += symmetric_product(torch.cat(moments, 1), torch.cat(down, 1)) * h
    return BasisMoments(gram, output)


def pooled_covariance(bases: Tensor, statistics: LayerStatistics) -> Tensor:
    """Second moment ``[1 or 2, rank, rank]`` float32 of z = input basis times x over the whole layer."""
    exact = bases.double()
    return (exact @ statistics.second_moment @ exact.transpose(1, 2)).float()


def _covariance_weights(
    statistics: LayerStatistics, tokens: ExpertTokens, parts: int, slot_weights: Tensor | None
) -> Tensor:
    """Weights ``[parts, routed]`` of an expert's tokens in its inputs' covariances, each adding up to 1.

    Of gate and up; where both are in one basis, the mean of the two: a covariance for each would double
    the work, which is most of the work there is, and gains nothing that could be measured.
    """
    both = slot_weights
    if both is None:
        both = statistics.slot_weights[:, tokens.tokens[: tokens.routed], tokens.slots]
    both = both / both.sum(1, keepdim=True).clamp_min(1e-30)
    return both if parts == 2 else both.mean(0, keepdim=True)


def own_share(tokens: ExpertTokens, rank: int, prior_strength: float) -> float:
    """Weight of an expert's own tokens in ``input_covariance``, 0 to 1; the rest is the layer's."""
    prior = prior_strength * rank
    return tokens.routed / max(tokens.routed + prior, 1e-9)


def input_covariance(
    z: Tensor,
    pooled: Tensor,
    statistics: LayerStatistics,
    tokens: ExpertTokens,
    prior_strength: float,
    slot_weights: Tensor | None = None,
) -> Tensor:
    """Second moments of z = input basis times x as one expert's gate and up see it.

    The estimate from few tokens is noisy, so it is blended with the layer's own second moment
    as if ``prior_strength * rank`` tokens of it had been seen.

    Args:
        z: ``[1 or 2, T, rank]`` float32, of gate and up together or of each.
        pooled: from ``pooled_covariance``.
        slot_weights: ``[2, routed]``, of the expert; default: those of ``statistics``.

    Returns:
        ``[1 or 2, rank, rank]`` float32, normalised to unit total weight.
    """
    share = own_share(tokens, z.shape[-1], prior_strength)
    weights = _covariance_weights(statistics, tokens, len(z), slot_weights)
    picked = z[:, tokens.tokens[: tokens.routed]]
    own = torch.stack([second_moment(x, weight) for x, weight in zip(picked, weights, strict=True)])
    return share * own + (1 - share) * pooled


def input_variance(
    z: Tensor,
    pooled: Tensor,
    statistics: LayerStatistics,
    tokens: ExpertTokens,
    prior_strength: float,
    slot_weights: Tensor | None = None,
) -> Tensor:
    """The diagonals ``[1 or 2, rank]`` of ``input_covariance`` alone."""
    share = own_share(tokens, z.shape[-1], prior_strength)
    weights = _covariance_weights(statistics, tokens, len(z), slot_weights)
    own = torch.einsum("pn,pnr->pr", weights, z[:, tokens.tokens[: tokens.routed]].square())
    return share * own + (1 - share) * pooled.diagonal(dim1=1, dim2=2)
