"""What calibration tells about one MoE layer: the second moments that the error model needs.

The error of the layer is the mean over tokens t of ``omega_t * |y_t - y'_t|^2 / hidden_size``
with ``omega_t = 1 / mean square of the residual stream after the layer at t`` (the next norm
divides by it), so errors of different layers are commensurable and attention-sink tokens with
enormous residuals do not rule. Expanding it to first order in the three factors of expert e,

    gate:  sum_i  E[a q_ti (d_i . z_t)^2],   a = omega p^2,  q_ti = (dh_i/dg_i)^2 |W_down[:, i]|^2
    up:    the same with dh_i/du_i
    down:  sum_k  |output_basis[:, k]|^2  d_k^T E[a h h^T] d_k

with d the rounding error of one neuron's (gate, up) or one rank's (down) factor. The expectation
of the first two is factored as (neuron weight E[a q_i]) x (covariance of z weighted by a sum_i q_i).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import product, rows, second_moment
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.activations import ExpertTokens, LayerActivations, routed_slots
from bitsmoe_plugin.calibration.expert_activity import expert_activity, hidden_activations
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights
from bitsmoe_plugin.models.gating import Gating

_PEAK_TOKENS = 256
"""Of an expert, those of its largest hidden activations, in which its largest output value is looked for."""
_BLOCK = 4096
"""Tokens whose inputs are in float32 at a time."""


@dataclass(frozen=True)
class LayerStatistics:
    """Attributes:
    second_moment: ``[H, H]`` float64, sum_te a x x^T / sum_te a, the inputs as routed.
    neuron_weights: ``[n, E, I]`` float32, E[a q_i] for gate and up (n = 2), or up alone.
    slot_weights: ``[n, T, k]`` float32, a sum_i q_ti of each routed (token, slot) that was looked at.
    output_peaks: ``[E]`` float32, largest absolute output value of each expert over the tokens routed to
        it, before the router's weight; 0 without any, or if they were not asked for.
    """

    second_moment: Tensor
    neuron_weights: Tensor
    slot_weights: Tensor
    output_peaks: Tensor


_INPUTS = {
    "hidden": "the input activations",
    "top_k_weights": "the router's weights",
    "token_weights": "the layer's outputs",
}


def check_finite(name: str, weights: ExpertWeights, activations: LayerActivations) -> None:
    """Raises QuantizationError for NaN or infinity in what a layer is given, or puts out."""
    given = [(part, tensor) for part, tensor in vars(activations).items() if part in _INPUTS]
    for part, tensor in (*vars(weights).items(), *given):
        if tensor is not None and not _all_finite(tensor):
            raise QuantizationError(
                f"{name}: NaN or infinity in {_INPUTS.get(part, part)}; quantization needs finite weights. "
                "Check the checkpoint (a bad download or a diverged training run), or load it in another "
                "dtype."
            )


def _all_finite(tensor: Tensor) -> bool:
    # A sum is finite only if all of its terms are, and takes a tenth of the time of looking at each.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_finite_statistics(name: str, statistics: LayerStatistics, **others: Tensor) -> None:
    """Raises QuantizationError for NaN or infinity, which finite weights and activations may still give."""
    for part, value in (*vars(statistics).items(), *others.items()):
        if not bool(torch.isfinite(value).all()):
            raise QuantizationError(
                f"{name}: NaN or infinity in the statistics ({part}): weights or activations are too large "
                "for float32. Check the checkpoint."
            )


@span("statistics")
def collect(
    weights: ExpertWeights,
    activations: LayerActivations,
    tokens: list[ExpertTokens],
    gating: Gating,
    neuron_weighting: bool = True,
    biases: ExpertBiases | None = None,
    sampled: list[ExpertTokens] | None = None,
    take: Callable[[int, Tensor], None] | None = None,
    peaks: bool = True,
) -> LayerStatistics:
    """Accumulate the statistics of one layer, one expert at a time.

    Args:
        tokens: whose inputs are in ``second_moment``.
        neuron_weighting: if not, the neurons of an expert weigh alike.
        biases: of the experts; those of down are in no statistic.
        sampled: for all the rest; default: ``tokens``.
        take: is given each expert's ``E[a h h^T] / H``, ``[I, I]`` float32, which are not kept.
        peaks: whether ``output_peaks`` are needed.
    """
    num_experts, size, h = weights.num_experts, weights.intermediate_size, weights.hidden_size
    device, inputs = activations.hidden.device, len(weights.inputs)
    neuron_weights = torch.empty(inputs, num_experts, size, device=device)
    slot_weights = torch.zeros(inputs, *activations.top_k_index.shape, device=device)
    largest = torch.zeros(num_experts, device=device)
    for expert, picked in enumerate(tokens if sampled is None else sampled):
        a, routed = picked.weights, picked.routed
        seen = expert_activity(weights, biases, gating, rows(activations.hidden, picked.tokens), expert)
        for part, q in enumerate(seen.importance):
            slot_weights[part, picked.tokens[:routed], picked.slots] = (a * q.sum(-1))[:routed]
            neuron_weights[part, expert] = a @ q if neuron_weighting else (a @ q).mean()
        if take is not None:
            take(expert, second_moment(seen.hidden, a) / h)
        if peaks and routed:
            largest[expert] = _output_peak(seen.hidden[:routed], weights.down[expert])
    return LayerStatistics(_input_moment(activations, tokens), neuron_weights, slot_weights, largest)


def _output_peak(hidden: Tensor, down: Tensor) -> Tensor:
    """Largest absolute output value of an expert ``[H, I]``, from hidden activations ``[n, I]``."""
    strong = hidden.square().sum(-1).topk(min(len(hidden), _PEAK_TOKENS)).indices
    return product(hidden[strong], rows(down)).abs().max()


def _input_moment(activations: LayerActivations, tokens: list[ExpertTokens]) -> Tensor:
    """``LayerStatistics.second_moment``, a block of tokens after the other."""
    hidden = activations.hidden
    mass = torch.zeros(len(hidden), device=hidden.device)
    for own in tokens:
        mass.index_add_(0, own.tokens, own.weights)
    mass /= mass.sum()
    moment = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for block, share in zip(hidden.split(_BLOCK), mass.split(_BLOCK), strict=True):
        moment += second_moment(block, share)
    return moment


@span("statistics")
def output_energy(
    weights: ExpertWeights, activations: LayerActivations, gating: Gating, biases: ExpertBiases | None
) -> float:
    """E[omega |y|^2 / H] of a whole layer, without the biases of down."""
    output = torch.zeros(activations.hidden.shape, device=activations.hidden.device)
    for expert, (token, slot) in enumerate(routed_slots(activations, weights.num_experts)):
        hidden = hidden_activations(weights, biases, gating, rows(activations.hidden, token), expert)
        single = product(hidden, rows(weights.down[expert]))
        output.index_add_(0, token, single.mul_(activations.top_k_weights[token, slot, None]))
    return float((output.square().mean(-1) * activations.token_weights).mean())
