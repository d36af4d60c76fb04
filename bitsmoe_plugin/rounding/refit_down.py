"""What becomes of an expert's activations when gate and up are rounded, and down factors that fit them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import columns, float_product, product, rows, second_moment, squared
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.activations import ExpertTokens, drawn, enough
from bitsmoe_plugin.calibration.expert_activity import expert_activity, hidden_activations
from bitsmoe_plugin.spectral.layer_feedback import slot_weights
from bitsmoe_plugin.spectral.layer_problem import LayerProblem

_REFIT_RIDGE = 0.003
REFIT_TOKENS = 8
"""Per neuron and expert at most (``enough``), that down is refitted to. Bundled model at 2 bits: unseen error
0.0154 and KL 0.0172; with 4 0.0165 and 0.0185; with all, 10.7, 0.0152 and 0.0171. Chance makes 0.0001 and
0.0002."""
TRIAL_TOKENS = 2048
"""Of an expert on average, that a trial is of."""


@dataclass(frozen=True)
class Exact:
    """What an unquantized expert computes for its calibration tokens.

    Attributes:
        tokens: n of the expert's tokens.
        hidden: ``[n, I]`` float32.
        slot_weights: ``[n, routed]`` float32 of all of its tokens, see ``statistics.LayerStatistics``, up to
            a constant factor.
    """

    tokens: ExpertTokens
    hidden: Tensor
    slot_weights: Tensor


def exact(problem: LayerProblem, expert: int) -> Exact:
    """Computed from the unquantized weights, once for feedback and refit."""
    own = problem.tokens[expert]
    some = problem.sample(expert, enough(REFIT_TOKENS, problem.shape.intermediate_size))
    inputs = rows(problem.activations.hidden, some.tokens)
    if some is not own:
        hidden = hidden_activations(problem.weights, problem.biases, problem.gating, inputs, expert)
        return Exact(some, hidden, slot_weights(problem, expert))
    seen = expert_activity(problem.weights, problem.biases, problem.gating, inputs, expert)
    a = own.weights[: own.routed]
    known = torch.stack([a * q[: own.routed].sum(-1) for q in seen.importance])
    return Exact(own, seen.hidden, known)


def _rounded_hidden(problem: LayerProblem, expert: int, tokens: ExpertTokens, values: Tensor) -> Tensor:
    """Hidden activations ``[n, I]`` of an expert with rounded gate and up, or up alone, decoded
    ``[n, r, I]``."""
    z = [rows(x, tokens.tokens) for x in problem.z]
    products = [product(x, columns(factor)) for x, factor in zip((z[0], z[-1]), values, strict=False)]
    return problem.hidden(*products, expert=expert)


@span("refit of down")
def refit_down(
    problem: LayerProblem, down: Tensor, values: Tensor, experts: list[int], given: list[Exact]
) -> Tensor:
    """Have down factors fit the wanted outputs from the rounded hidden activations.

    Ridge regression towards the exact factor F: with h the exact and h' the rounded activations and
    t what is wanted besides F h (see ``_missing_output``),
    F' = (E[a (F h + t) h'^T] + l F)(E[a h' h'^T] + l I)^-1
       = F + (F E[a (h - h') h'^T] + E[a t h'^T])(E[a h' h'^T] + l I)^-1, blended with F by tokens per neuron.

    Args:
        down: F, ``[e, r, I]``; becomes F'.
        values: ``[n, e, r, I]``, decoded gate and up, or up alone.
        given: of each of ``experts``.

    Returns:
        second moments E[a h' h'^T] ``[e, I, I]`` to round them with.
    """
    size, h = problem.shape.intermediate_size, problem.shape.hidden_size
    moments = torch.empty(len(experts), size, size, device=problem.device)
    eye = torch.eye(size, device=problem.device)
    for i, (expert, known) in enumerate(zip(experts, given, strict=True)):
        a, routed = known.tokens.weights / h, known.tokens.routed
        if not problem.config.refit:
            moments[i] = second_moment(known.hidden, a)
            continue
        rounded = columns(_rounded_hidden(problem, expert, known.tokens, values[:, i]), a)
        own, cross = squared(rounded), product(columns(known.hidden, a), rounded)
        ridge = _REFIT_RIDGE * own.diagonal().mean().clamp_min(1e-30) * eye
        # It cancels most of what it is multiplied with, and would leave the rounding errors of integers.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(own + ridge))
        change = product(rows(down[i]), columns(float_product(cross.sub_(own), inverse)))
        if problem.drift is not None:
            missing = _missing_output(problem, known.tokens, problem.drift)
            change += float_product(product(columns(missing, a), rounded), inverse)
        down[i] += routed / (routed + 2 * size) * change
        moments[i] = own
    return moments


def _missing_output(problem: LayerProblem, own: ExpertTokens, drift: Tensor) -> Tensor:
    """An expert's part ``[n, r]`` in making up for what earlier layers lost at its tokens, ``[T, r]``; 0
    where it is not routed.

    With p the router's weights of a token, drift * p / sum(p^2): the parts, weighted by p, add up
    to the whole drift. (GPTAQ, arXiv 2504.02692, aims at the unquantized model's outputs likewise.)
    """
    tokens = own.tokens[: own.routed]
    weights = problem.activations.top_k_weights[tokens]
    share = weights.gather(1, own.slots[:, None]) / weights.square().sum(-1, keepdim=True).clamp_min(1e-12)
    missing = torch.zeros(len(own.tokens), drift.shape[1], device=drift.device)
    missing[: own.routed] = drift[tokens] * share
    return missing


@span("trial")
def sampled_error(problem: LayerProblem, experts: list[int], values: Tensor) -> float:
    """Share of some experts in the layer's output error, errors of different experts included.

    A token's experts err in related ways, so their errors add up to more than the sum of squares.
    Of the pairs of experts a sample of n out of E holds n (n - 1) / (E (E - 1)), of the experts n / E;
    the cross terms are scaled up by the ratio.

    Args:
        values: ``[f, e, r, I]``, decoded factors of ``experts``.
    """
    shape, acts = problem.shape, problem.activations
    chosen, share = _trial_tokens(problem)
    total = torch.zeros(acts.hidden.shape[0], shape.hidden_size, device=problem.device)
    alone = routed_alone = 0.0
    for i, expert in enumerate(experts):
        own = problem.tokens[expert].within(chosen)
        error = _output_error(problem, expert, own, values[:, i])
        squares = error.square().mean(-1) * own.weights
        alone += float(squares.sum())
        routed_alone += float(squares[: own.routed].sum())
        tokens = own.tokens[: own.routed]
        total.index_add_(0, tokens, error[: own.routed] * acts.top_k_weights[tokens, own.slots, None])
    together = float((total.square().mean(-1) * acts.token_weights).mean())
    pairs = (shape.num_experts - 1) / max(len(experts) - 1, 1)
    return (alone + (together - routed_alone) * pairs) / share


def _trial_tokens(problem: LayerProblem) -> tuple[Tensor, float]:
    """Tokens of the layer that a trial is of, ``[T]`` bool, and their share."""
    total, per_token = problem.activations.top_k_index.shape
    count = min(total, -(-TRIAL_TOKENS * problem.shape.num_experts // per_token))
    chosen = torch.zeros(total, dtype=torch.bool, device=problem.device)
    chosen[drawn(total, count, problem.config.seed, problem.device)] = True
    return chosen, count / total


def _output_error(problem: LayerProblem, expert: int, tokens: ExpertTokens, values: Tensor) -> Tensor:
    """``[n, H]``, of an expert with the decoded factors ``[f, r, I]``."""
    inputs = rows(problem.activations.hidden, tokens.tokens)
    hidden = hidden_activations(problem.weights, problem.biases, problem.gating, inputs, expert)
    error = product(hidden, rows(problem.weights.down[expert]))
    rounded = _rounded_hidden(problem, expert, tokens, values[:-1])
    error -= product(product(rounded, values[-1]), problem.output_basis)
    return error
