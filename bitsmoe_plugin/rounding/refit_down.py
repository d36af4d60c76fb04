"""What becomes of an expert's activations when gate and up are rounded, and down factors that fit them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitsmoe_plugin.base.linalg import product, second_moment, squared, weighted_columns
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.expert_activity import expert_activity
from bitsmoe_plugin.spectral.layer_problem import LayerProblem

_REFIT_RIDGE = 0.003


@dataclass(frozen=True)
class Exact:
    """What an unquantized expert computes for its calibration tokens.

    Attributes:
        hidden: ``[n, I]`` float32.
        slot_weights: ``[n, routed]`` float32, see ``statistics.LayerStatistics``.
    """

    hidden: Tensor
    slot_weights: Tensor


def exact(problem: LayerProblem, expert: int) -> Exact:
    """Computed from the unquantized weights, once for feedback and refit."""
    own = problem.tokens[expert]
    inputs = problem.activations.hidden[own.tokens]
    seen = expert_activity(problem.weights, problem.biases, problem.gating, inputs, expert)
    a = own.weights[: own.routed]
    return Exact(seen.hidden, torch.stack([a * q[: own.routed].sum(-1) for q in seen.importance]))


def _rounded_hidden(problem: LayerProblem, expert: int, values: Tensor) -> Tensor:
    """Hidden activations ``[n, I]`` of an expert with rounded gate and up, or up alone, decoded
    ``[n, r, I]``."""
    z = problem.z[:, problem.tokens[expert].tokens]
    products = [product(*pair) for pair in zip((z[0], z[-1]), values.mT, strict=False)]
    return problem.hidden(*products, expert=expert)


@span("refit of down")
def refit_down(
    problem: LayerProblem, values: Tensor, experts: list[int], given: list[Exact]
) -> tuple[Tensor, Tensor]:
    """Down factors that fit the wanted outputs from the rounded hidden activations.

    Ridge regression towards the exact factor F: with h the exact and h' the rounded activations and
    t what is wanted besides F h (see ``_missing_output``),
    F' = (E[a (F h + t) h'^T] + l F)(E[a h' h'^T] + l I)^-1, blended with F by tokens per neuron.

    Args:
        values: ``[n, e, r, I]``, decoded gate and up, or up alone.
        given: of each of ``experts``.

    Returns:
        factors ``[e, r, I]`` and second moments E[a h' h'^T] ``[e, I, I]`` to round them with.
    """
    down = problem.down_factors(experts)
    size, h = problem.shape.intermediate_size, problem.shape.hidden_size
    moments = torch.empty(len(experts), size, size, device=problem.device)
    eye = torch.eye(size, device=problem.device)
    for i, expert in enumerate(experts):
        a = problem.tokens[expert].weights / h
        if not problem.config.refit:
            moments[i] = second_moment(given[i].hidden, a)
            continue
        rounded = weighted_columns(_rounded_hidden(problem, expert, values[:, i]), a)
        own, cross = squared(rounded), product(weighted_columns(given[i].hidden, a), rounded)
        ridge = _REFIT_RIDGE * own.diagonal().mean().clamp_min(1e-30) * eye
        wanted = product(down[i], (cross + ridge).T)
        routed = problem.tokens[expert].routed
        if problem.drift is not None:
            missing = weighted_columns(_missing_output(problem, expert, problem.drift), a[:routed])
            wanted += product(pad(missing, (0, rounded.shape[1] - missing.shape[1])), rounded)
        fitted = product(wanted, torch.cholesky_inverse(torch.linalg.cholesky(own + ridge)))
        down[i] += routed / (routed + 2 * size) * (fitted - down[i])
        moments[i] = own
    return down, moments


def _missing_output(problem: LayerProblem, expert: int, drift: Tensor) -> Tensor:
    """An expert's part ``[routed, r]`` in making up for what earlier layers lost at its tokens, ``[T, r]``.

    With p the router's weights of a token, drift * p / sum(p^2): the parts, weighted by p, add up
    to the whole drift. (GPTAQ, arXiv 2504.02692, aims at the unquantized model's outputs likewise.)
    """
    own = problem.tokens[expert]
    tokens = own.tokens[: own.routed]
    weights = problem.activations.top_k_weights[tokens]
    share = weights.gather(1, own.slots[:, None]) / weights.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return drift[tokens] * share


@span("trial")
def sampled_error(problem: LayerProblem, experts: list[int], values: Tensor, given: list[Exact]) -> float:
    """Share of some experts in the layer's output error, errors of different experts included.

    A token's experts err in related ways, so their errors add up to more than the sum of squares.
    Of the pairs of experts a sample of n out of E holds n (n - 1) / (E (E - 1)), of the experts n / E;
    the cross terms are scaled up by the ratio.

    Args:
        values: ``[f, e, r, I]``, decoded factors of ``experts``.
        given: of each of them.
    """
    shape, acts = problem.shape, problem.activations
    total = torch.zeros(acts.hidden.shape[0], shape.hidden_size, device=problem.device)
    alone = routed_alone = 0.0
    for i, expert in enumerate(experts):
        own = problem.tokens[expert]
        rounded = _rounded_hidden(problem, expert, values[:-1, i])
        down = problem.weights.down[expert].float()
        error = product(given[i].hidden, down)
        error -= product(product(rounded, values[-1, i]), problem.output_basis)
        squares = error.square().mean(-1) * own.weights
        alone += float(squares.sum())
        routed_alone += float(squares[: own.routed].sum())
        tokens = own.tokens[: own.routed]
        total.index_add_(0, tokens, error[: own.routed] * acts.top_k_weights[tokens, own.slots, None])
    together = float((total.square().mean(-1) * acts.token_weights).mean())
    pairs = (shape.num_experts - 1) / max(len(experts) - 1, 1)
    return alone + (together - routed_alone) * pairs
