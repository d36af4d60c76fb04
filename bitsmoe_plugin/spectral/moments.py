"""Second moments of neurons, outputs and inputs, from the weights and statistics of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import product, projected_moment, rows, second_moment, symmetric_product
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.activations import ExpertTokens, drawn_by_weight, enough
from bitsmoe_plugin.calibration.statistics import LayerStatistics
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.spectral.error_feedback import feedback_of, on_other_tokens

_TOGETHER = 8
"""Experts whose products are taken as one."""

COVARIANCE_TOKENS = 3
"""Per dimension and expert at most (``enough``), that covariances of inputs are of. Bundled model at 2 bits:
unseen error 0.0153 and KL 0.0172; with all, 5.3, 0.0152 and 0.0171. Chance makes 0.0001 and 0.0002."""

_NEURONS_PER_DIMENSION = 24
"""Neurons for each dimension of the input that bases are learnt from; experts beyond are passed over, evenly.
Half of the bundled model's experts, 12 neurons per dimension, gave the same KL as all (0.0202, 0.0203); but a
layer of random experts, which share less, has 4 % more error with 16 than with 24 of its 48."""


@dataclass(frozen=True)
class BasisMoments:
    """What the bases of a layer are the principal directions of.

    Attributes:
        gram: ``[n, H, H]`` float64, of gate and up, or up: sum over experts and neurons of weight * w w^T.
        output: ``[H, H]`` float64, E[sum_e a y_e y_e^T] of the experts' outputs.
    """

    gram: Tensor
    output: Tensor


class HiddenMoments:
    """What is kept of the experts' ``E[a h h^T] / H``: given one after the other, each is looked at once.

    Attributes:
        variance: ``[E, I]`` float32, ``Feedback.variance`` of each, as it is on other tokens.
        energy: ``[E]`` float32, mean of each diagonal.
    """

    def __init__(self, weights: ExpertWeights, config: BitsMoEConfig, tokens: list[int]) -> None:
        """
        Args:
            tokens: that the moment of each expert is known from.
        """
        experts, h, device = weights.num_experts, weights.hidden_size, weights.up.device
        self.variance = torch.empty(experts, weights.intermediate_size, device=device)
        self.energy = torch.empty(experts, device=device)
        self._weights, self._config, self._tokens = weights, config, tokens
        self._output = torch.zeros(h, h, dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def take(self, expert: int, moment: Tensor) -> None:
        """Add ``[I, I]``, the moment of an expert; those that bases are learnt from, in their order. Of one
        that is not finite the energy alone is kept, which says so."""
        self.energy[expert] = moment.diagonal().mean()
        if not bool(torch.isfinite(moment.sum())):
            self.energy[expert] = torch.nan
            return
        self.variance[expert] = self._variance(moment, self._tokens[expert])
        if expert % basis_stride(self._weights.shape) == 0:
            self._add_output(self._weights.down[expert], moment)

    @span("costs")
    def _variance(self, moment: Tensor, tokens: int) -> Tensor:
        """``[I]``"""
        variance = feedback_of(moment[None], self._config, [tokens]).variance[0]
        return on_other_tokens(variance, tokens) if self._config.feedback else variance

    def output(self) -> Tensor:
        """``BasisMoments.output`` of what was taken."""
        self._settle()
        return self._output

    @span("bases")
    def _add_output(self, down: Tensor, moment: Tensor) -> None:
        self._waiting.append((product(rows(down), moment), down.float()))
        if len(self._waiting) == _TOGETHER:
            self._settle()

    def _settle(self) -> None:
        if self._waiting:
            left, right = (torch.cat(matrices, 1) for matrices in zip(*self._waiting, strict=True))
            self._output += symmetric_product(left, right) * self._weights.hidden_size
            self._waiting = []


def basis_stride(shape: LayerShape) -> int:
    """Bases are learnt from every so-manyth expert."""
    return max(1, shape.num_experts * shape.intermediate_size // (_NEURONS_PER_DIMENSION * shape.hidden_size))


def basis_moments(
    weights: ExpertWeights, statistics: LayerStatistics, hidden: HiddenMoments, neuron_weighting: bool = True
) -> BasisMoments:
    """Sums over the experts of a layer, or over so many of them as tell its principal directions.

    Args:
        neuron_weighting: if not, all neurons of gate and up weigh alike.
    """
    h, stride = weights.hidden_size, basis_stride(weights.shape)
    gram = torch.zeros(len(weights.inputs), h, h, dtype=torch.float64, device=weights.up.device)
    for first in range(0, weights.num_experts, _TOGETHER * stride):
        some = slice(first, first + _TOGETHER * stride, stride)
        for part, matrices in enumerate(weights.inputs):
            neurons = matrices[some].flatten(0, 1)
            share = statistics.neuron_weights[part, some].flatten()
            gram[part] += second_moment(neurons, share if neuron_weighting else torch.ones_like(share))
    return BasisMoments(gram, hidden.output())


def pooled_covariance(bases: Tensor, statistics: LayerStatistics) -> Tensor:
    """Second moment ``[1 or 2, rank, rank]`` float32 of z = input basis times x over the whole layer."""
    return torch.stack([projected_moment(basis, statistics.second_moment) for basis in bases])


def _covariance_weights(slot_weights: Tensor, parts: int) -> Tensor:
    """Weights ``[parts, routed]`` of an expert's tokens in its inputs' covariances, each adding up to 1.

    Of gate and up; where both are in one basis, the mean of the two: a covariance for each would double
    the work, which is most of the work there is, and gains nothing that could be measured.

    Args:
        slot_weights: ``[n, routed]``, see ``LayerStatistics``.
    """
    both = slot_weights / slot_weights.sum(1, keepdim=True).clamp_min(1e-30)
    return both if parts == 2 else both.mean(0, keepdim=True)


def own_share(tokens: ExpertTokens, rank: int, prior_strength: float) -> float:
    """Weight of an expert's own tokens in ``input_covariance``, 0 to 1; the rest is the layer's."""
    prior = prior_strength * rank
    return tokens.routed / max(tokens.routed + prior, 1e-9)


def input_covariance(
    z: Tensor, pooled: Tensor, tokens: ExpertTokens, slot_weights: Tensor, share: float, seed: int = 0
) -> Tensor:
    """Second moments of z = input basis times x as one expert's gate and up see it.

    The estimate from few tokens is noisy, so it is blended with the layer's own second moment
    as if ``prior_strength * rank`` tokens of it had been seen.

    Args:
        z: ``[1 or 2, T, rank]`` float32, of gate and up together or of each.
        pooled: from ``pooled_covariance``.
        slot_weights: ``[n, routed]``, of ``tokens``.
        share: from ``own_share``.
        seed: of ``COVARIANCE_TOKENS``.

    Returns:
        ``[1 or 2, rank, rank]`` float32, normalised to unit total weight.
    """
    weights = _covariance_weights(slot_weights, len(z))
    mean = weights.mean(0)
    some, raised = drawn_by_weight(mean, enough(COVARIANCE_TOKENS, z.shape[-1]), seed)
    weights = weights[:, some] * (raised / mean[some].clamp_min(1e-30))
    picked = tokens.tokens[some]
    own = torch.stack([second_moment(x, weight, picked) for x, weight in zip(z, weights, strict=True)])
    return own.mul_(share).add_(pooled, alpha=1 - share)


def input_variance(
    z: Tensor, pooled: Tensor, tokens: ExpertTokens, slot_weights: Tensor, share: float
) -> Tensor:
    """The diagonals ``[1 or 2, rank]`` of ``input_covariance`` alone."""
    weights = _covariance_weights(slot_weights, len(z))
    picked = tokens.tokens[: tokens.routed]
    own = torch.stack([weight @ x[picked].square_() for x, weight in zip(z, weights, strict=True)])
    return share * own + (1 - share) * pooled.diagonal(dim1=1, dim2=2)
