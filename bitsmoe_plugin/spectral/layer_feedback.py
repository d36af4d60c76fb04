"""Error feedback of a layer's experts, from the second moments of what their factors are multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import rows
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.activations import enough
from bitsmoe_plugin.calibration.expert_activity import expert_activity
from bitsmoe_plugin.spectral.error_feedback import Feedback, feedback_of
from bitsmoe_plugin.spectral.layer_problem import LayerProblem
from bitsmoe_plugin.spectral.moments import COVARIANCE_TOKENS, input_covariance, input_variance, own_share

IMPORTANCE_NEURONS = 128
"""Of an expert, evenly spaced, which tell how much a token matters to it. (Bundled model: 16 of its 64 do as
well as all.)"""


def slot_weights(problem: LayerProblem, expert: int) -> Tensor:
    """``[n, routed]`` float32 of all of an expert's tokens, see ``statistics.LayerStatistics``, up to a
    constant factor."""
    stride = max(1, problem.shape.intermediate_size // IMPORTANCE_NEURONS)
    own, biases = problem.tokens[expert], problem.biases
    inputs = rows(problem.activations.hidden, own.tokens[: own.routed])
    biases = None if biases is None else biases.every(stride)
    seen = expert_activity(problem.weights.every(stride), biases, problem.gating, inputs, expert)
    return torch.stack([own.weights[: own.routed] * q.sum(-1) for q in seen.importance])


@span("feedback")
def rank_feedback(problem: LayerProblem, expert: int, known: Tensor | None = None) -> Feedback:
    """Feedback of an expert's gate and up: ``[1 or 2]`` of the rank.

    Args:
        known: ``slot_weights``.
    """
    config = problem.config
    if not config.feedback:
        return Feedback.none(_variance(problem, expert), config.damping)
    tokens = problem.tokens[expert]
    known = slot_weights(problem, expert) if known is None else known
    share = own_share(tokens, problem.shape.rank, config.covariance_prior)
    covariance = input_covariance(problem.z, problem.pooled, tokens, known, share, config.seed + expert)
    count = min(tokens.routed, enough(COVARIANCE_TOKENS, problem.shape.rank))
    return feedback_of(covariance, config, [count] * len(covariance))


def _variance(problem: LayerProblem, expert: int) -> Tensor:
    """Diagonals ``[1 or 2, r]`` of an expert's covariance, as the tokens that statistics are of tell them."""
    sample = problem.sampled[expert]
    share = own_share(problem.tokens[expert], problem.shape.rank, problem.config.covariance_prior)
    known = sample.of_slots(problem.statistics.slot_weights)
    return input_variance(problem.z, problem.pooled, sample, known, share)


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
    total = torch.stack([_variance(problem, expert) for expert in experts], 1)
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
