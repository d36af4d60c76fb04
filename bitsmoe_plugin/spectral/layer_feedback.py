"""Error feedback of a layer's experts, from the second moments of what their factors are multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.statistics import ExpertTokens, LayerStatistics
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.spectral.bases import Experts
from bitsmoe_plugin.spectral.error_feedback import Feedback
from bitsmoe_plugin.spectral.layer_problem import LayerProblem
from bitsmoe_plugin.spectral.moments import input_covariance, input_variance, own_share

_MOST_DAMPING = 10.0
"""Times the option's."""


def damping(config: BitsMoEConfig, tokens: int, dimensions: int) -> float:
    """Share of the mean diagonal that is added to the second moment of so many tokens before it is inverted.

    Ten times the option's with up to one token per dimension, falling with the square of more, the option's
    from about three on. (Bundled model, unseen error at 2 bits with 0.1 for 0.01, by tokens per dimension:
    0.25 -12 %, 1 -9 %, 2.7 -3 %, 10.7 +0.8 %; at 3 bits with 0.02 for 0.01 at 5: +2 %.)
    """
    known = tokens / dimensions
    return min(1.0, config.damping * max(1.0, _MOST_DAMPING / max(1.0, known) ** 2))


def hidden_feedback(problem: LayerProblem, moments: Tensor, experts: Experts) -> Feedback:
    """Feedback of the neurons of some experts, from second moments ``[e, I, I]``."""
    own = problem.tokens[experts] if isinstance(experts, slice) else [problem.tokens[e] for e in experts]
    return feedback_of(moments, problem.config, [seen.routed for seen in own])


def feedback_of(moments: Tensor, config: BitsMoEConfig, tokens: list[int] | None = None) -> Feedback:
    """Feedback of second moments ``[..., n, n]``, none if the config switches it off.

    Args:
        tokens: that each is known from; default: plenty.
    """
    if config.feedback:
        size = moments.shape[-1]
        shares = None if tokens is None else [damping(config, count, size) for count in tokens]
        return Feedback.of(moments, config.damping if shares is None else shares)
    return Feedback.none(moments.diagonal(dim1=-2, dim2=-1), config.damping)


@span("feedback")
def rank_feedback(problem: LayerProblem, expert: int, slot_weights: Tensor | None = None) -> Feedback:
    """Feedback of an expert's gate and up: ``[1 or 2]`` of the rank.

    Args:
        slot_weights: ``[2, routed]``, where the problem has not those of all experts.
    """
    config, seen = problem.config, _seen_by(problem, expert)
    if config.feedback:
        covariance = input_covariance(*seen, slot_weights)
        return feedback_of(covariance, config, [problem.tokens[expert].routed] * len(covariance))
    return Feedback.none(input_variance(*seen, slot_weights), config.damping)


def rank_variances(problem: LayerProblem, known: dict[int, Feedback]) -> Tensor:
    """``Feedback.variance`` of all experts, ``[1 or 2, E, r]``.

    Feedback takes a Cholesky factor per expert. Of the others, what it explains of their inputs' variance
    is taken from the experts whose feedback is known, and from the layer's own covariance: the less an
    expert has seen itself, the more from that.
    """
    config, rank = problem.config, problem.shape.rank
    experts = range(problem.shape.num_experts)
    if not config.feedback:
        return torch.stack([rank_feedback(problem, expert).variance for expert in experts], 1)
    total = torch.stack([input_variance(*_seen_by(problem, expert)) for expert in experts], 1)
    total += config.damping * total.mean(-1, keepdim=True).clamp_min(1e-30)
    shares = [own_share(tokens, rank, config.covariance_prior) for tokens in problem.tokens]
    share = torch.tensor(shares, device=problem.device)
    exact = torch.stack([feedback.variance for feedback in known.values()], 1)
    sample = list(known)
    left = (exact / total[:, sample]).log().mean(1, keepdim=True)
    diagonal = Feedback.none(problem.pooled.diagonal(dim1=-2, dim2=-1), config.damping).variance
    left_of_layer = (feedback_of(problem.pooled, config).variance / diagonal).log()[:, None]
    own = (share / share[sample].mean().clamp_min(1e-9)).clamp_max(1.0)[:, None]
    total *= (own * left + (1 - own) * left_of_layer).exp()
    total[:, sample] = exact
    return total


def _seen_by(
    problem: LayerProblem, expert: int
) -> tuple[Tensor, Tensor, LayerStatistics, ExpertTokens, float]:
    return (
        problem.z,
        problem.pooled,
        problem.statistics,
        problem.tokens[expert],
        problem.config.covariance_prior,
    )
