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

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import product, second_moment
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.expert_activity import expert_activity
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights
from bitsmoe_plugin.models.gating import Gating

PRIOR_TOKENS = 64
"""An expert with fewer routed tokens also sees this many tokens drawn from the whole layer."""


@dataclass(frozen=True)
class LayerActivations:
    """Inputs and routing of one MoE layer over the calibration text (T tokens, k experts each).

    Attributes:
        hidden: ``[T, hidden_size]``, model dtype.
        top_k_index: ``[T, k]`` int64; ids >= num_experts mean "nowhere".
        top_k_weights: ``[T, k]`` float32.
        token_weights: ``[T]`` float32, omega of the module text.
    """

    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    token_weights: Tensor

    def first(self, tokens: int) -> LayerActivations:
        """The first ``tokens`` tokens."""
        return LayerActivations(*(tensor[:tokens] for tensor in vars(self).values()))

    def sampled(self, tokens: int, seed: int) -> LayerActivations:
        """So many tokens, drawn at random; all, where there are no more."""
        total, device = len(self.hidden), self.hidden.device
        if tokens >= total:
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(total, generator=generator, device="cpu")
        chosen = order[:tokens].sort().values.to(device)
        return LayerActivations(*(tensor[chosen] for tensor in vars(self).values()))


@dataclass(frozen=True)
class LayerStatistics:
    """Attributes:
    second_moment: ``[H, H]`` float64, sum_te a x x^T / sum_te a, the inputs as routed.
    hidden_moment: ``[E, I, I]`` float32, E[a h h^T] / H per expert; of no expert if it was not asked for.
    neuron_weights: ``[n, E, I]`` float32, E[a q_i] for gate and up (n = 2), or up alone.
    slot_weights: ``[n, T, k]`` float32, a sum_i q_ti of each routed (token, slot).
    output_energy: E[omega |y|^2 / H] of the whole layer; 0 if it was not asked for.
    output_peaks: ``[E]`` float32, largest absolute output value of each expert over the tokens routed to
        it, before the router's weight; 0 without any, or if they were not asked for.
    """

    second_moment: Tensor
    hidden_moment: Tensor
    neuron_weights: Tensor
    slot_weights: Tensor
    output_energy: float
    output_peaks: Tensor


def routed_slots(activations: LayerActivations, num_experts: int) -> list[tuple[Tensor, Tensor]]:
    """For each expert the (token, slot) index pairs that are routed to it."""
    flat = activations.top_k_index.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    k = activations.top_k_index.shape[1]
    pieces = order[: sum(counts)].split(counts)
    return [(piece // k, piece % k) for piece in pieces]


@dataclass(frozen=True)
class ExpertTokens:
    """Calibration tokens of one expert.

    Attributes:
        tokens: ``[n]`` int64, rows of ``LayerActivations.hidden``; the routed ones come first.
        slots: ``[routed]`` int64, their column in ``top_k_index``.
        weights: ``[n]`` float32, a = omega p^2 / T.
    """

    tokens: Tensor
    slots: Tensor
    weights: Tensor

    @property
    def routed(self) -> int:
        return len(self.slots)


def expert_tokens(
    activations: LayerActivations, num_experts: int, seed: int, all_tokens: bool = False
) -> list[ExpertTokens]:
    """Routed tokens of every expert; thin experts are topped up with tokens of the whole layer.

    The added tokens weigh together as much as the layer's median expert, less what the expert has
    seen itself, so that an unrouted expert counts as a typical one instead of as worthless.

    Args:
        all_tokens: every expert also sees all other tokens, as if they were ``PRIOR_TOKENS`` of the layer's.
    """
    generator = torch.Generator().manual_seed(seed)
    total = activations.hidden.shape[0]
    weight = activations.token_weights[:, None] * activations.top_k_weights.square() / total
    slots = routed_slots(activations, num_experts)
    mass = torch.stack([weight[token, slot].sum() for token, slot in slots])
    if not bool((mass > 0).any()):
        raise QuantizationError("no calibration token is routed to any expert of a layer")
    typical = mass[mass > 0].median()
    tokens = []
    for token, slot in slots:
        a = weight[token, slot]
        if all_tokens:
            others = torch.ones(total, dtype=torch.bool, device=token.device)
            others[token] = False
            extra = torch.nonzero(others).flatten()
            share = typical * PRIOR_TOKENS / (len(token) + PRIOR_TOKENS) / max(len(extra), 1)
            token, a = torch.cat([token, extra]), torch.cat([a, share.expand(len(extra))])
        elif len(token) < PRIOR_TOKENS:
            extra = torch.randint(total, (PRIOR_TOKENS,), generator=generator, device="cpu").to(token.device)
            share = (1 - len(token) / PRIOR_TOKENS) * typical / PRIOR_TOKENS
            token, a = torch.cat([token, extra]), torch.cat([a, share.expand(PRIOR_TOKENS)])
        tokens.append(ExpertTokens(token, slot, a))
    return tokens


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


def check_finite_statistics(name: str, statistics: LayerStatistics) -> None:
    """Raises QuantizationError for NaN or infinity, which finite weights and activations may still give."""
    for part, value in vars(statistics).items():
        if not bool(torch.isfinite(torch.as_tensor(value)).all()):
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
    hidden_moments: bool = True,
    outputs: bool = True,
) -> LayerStatistics:
    """Accumulate the statistics of one layer, one expert at a time.

    Args:
        biases: of the experts; those of down are in no statistic, ``output_energy`` included.
        neuron_weighting: if not, the neurons of an expert weigh alike.
        hidden_moments: whether ``hidden_moment`` is needed.
        outputs: whether ``output_energy`` and ``output_peaks`` are.
    """
    num_experts, size, h = weights.num_experts, weights.intermediate_size, weights.hidden_size
    device = activations.hidden.device
    hidden_moment = torch.empty(num_experts if hidden_moments else 0, size, size, device=device)
    inputs = len(weights.inputs)
    neuron_weights = torch.empty(inputs, num_experts, size, device=device)
    slot_weights = torch.zeros(inputs, *activations.top_k_index.shape, device=device)
    output = torch.zeros(activations.hidden.shape[0] if outputs else 0, h, device=device)
    peaks = torch.zeros(num_experts, device=device)
    token_mass = torch.zeros(activations.hidden.shape[0], device=device)
    for expert, picked in enumerate(tokens):
        a, routed = picked.weights, picked.routed
        seen = expert_activity(weights, biases, gating, activations.hidden[picked.tokens], expert)
        for part, q in enumerate(seen.importance):
            slot_weights[part, picked.tokens[:routed], picked.slots] = (a * q.sum(-1))[:routed]
            neuron_weights[part, expert] = a @ q if neuron_weighting else (a @ q).mean()
        if hidden_moments:
            hidden_moment[expert] = second_moment(seen.hidden, a) / h
        token_mass.index_add_(0, picked.tokens, a)
        if not outputs:
            continue
        p = activations.top_k_weights[picked.tokens[:routed], picked.slots, None]
        single = product(seen.hidden[:routed], weights.down[expert].float())
        peaks[expert] = single.abs().max() if routed else 0.0
        output.index_add_(0, picked.tokens[:routed], single * p)
    x = activations.hidden.float()
    return LayerStatistics(
        second_moment=second_moment(x, token_mass / token_mass.sum()).double(),
        hidden_moment=hidden_moment,
        neuron_weights=neuron_weights,
        slot_weights=slot_weights,
        output_energy=float((output.square().mean(-1) * activations.token_weights).mean())
        if outputs
        else 0.0,
        output_peaks=peaks,
    )
