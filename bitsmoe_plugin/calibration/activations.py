"""What the experts of a layer are given: inputs, routing, and the tokens that each of them sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.errors import QuantizationError

PRIOR_TOKENS = 64
"""An expert with fewer routed tokens also sees this many tokens drawn from the whole layer."""

FEWEST_SAMPLED = 6144
"""Tokens of an expert of which none is passed over: in small experts each takes little time."""

LOUD = 16
"""One in so many of an expert's sampled tokens are those of the largest residual stream after the layer, in
which extreme outputs show."""


@dataclass(frozen=True)
class LayerActivations:
    """Inputs and routing of one MoE layer over the calibration text (T tokens, k experts each).

    Attributes:
        hidden: ``[T, hidden_size]``, model dtype.
        top_k_index: ``[T, k]`` int64; ids >= num_experts mean "nowhere".
        top_k_weights: ``[T, k]`` float32.
        token_weights: ``[T]`` float32, omega of the module text of ``statistics``.
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
        if tokens >= len(self.hidden):
            return self
        chosen = drawn(len(self.hidden), tokens, seed, self.hidden.device)
        return LayerActivations(*(tensor[chosen] for tensor in vars(self).values()))


def enough(per_dimension: int, dimensions: int) -> int:
    """Tokens of an expert from which second moments of so many dimensions are taken at most."""
    return max(FEWEST_SAMPLED, per_dimension * dimensions)


def drawn(total: int, count: int, seed: int, device: torch.device) -> Tensor:
    """``count`` of ``total`` positions, drawn at random, in their order; all, where there are no more."""
    return drawn_order(total, seed, device)[:count].sort().values


def drawn_order(total: int, seed: int, device: torch.device) -> Tensor:
    """Positions in random order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator, device="cpu").to(device)


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

    def of_slots(self, values: Tensor) -> Tensor:
        """``[..., routed]``, those of the routed ones of ``[..., T, k]``."""
        return values[..., self.tokens[: self.routed], self.slots]

    def sampled(self, most: int, token_weights: Tensor, seed: int) -> ExpertTokens:
        """At most so many of the routed ones and of the others; what are left weigh as much as all.

        Args:
            token_weights: of the activations. Of routed tokens one in ``LOUD`` are those of least weight.
        """
        n = self.routed
        if max(n, len(self.tokens) - n) <= most:
            return self
        loud = token_weights[self.tokens[:n]].argsort(stable=True)[: most // LOUD]
        routed = drawn_by_weight(self.weights[:n], most, seed, loud)
        others = drawn_by_weight(self.weights[n:], most, seed)
        positions = torch.cat([routed[0], n + others[0]])
        weights = torch.cat([routed[1], others[1]])
        return ExpertTokens(self.tokens[positions], self.slots[routed[0]], weights)

    def within(self, chosen: Tensor) -> ExpertTokens:
        """Those of ``chosen``, ``[T]`` bool."""
        kept = chosen[self.tokens]
        return ExpertTokens(self.tokens[kept], self.slots[kept[: self.routed]], self.weights[kept])


def drawn_by_weight(
    weights: Tensor, most: int, seed: int, certain: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions of at most ``most`` of ``weights``, rising, and weights for them: drawn in proportion to
    theirs, so that few that count much are not lost among many that count little.

    Args:
        certain: positions that are not left to chance; as are those of more than their share.
    """
    n, device = len(weights), weights.device
    if n <= most:
        return torch.arange(n, device=device), weights
    sure = torch.zeros(n, dtype=torch.bool, device=device)
    if certain is not None:
        sure[certain] = True
    while True:
        share = weights[~sure].double().sum() / max(most - int(sure.sum()), 1)
        more = (weights >= share) & (weights > 0) & ~sure
        if not bool(more.any()) or int(sure.sum()) >= most:
            break
        sure |= more
    # Systematic sampling in random order: each once for every ``share`` that the sum of weights passes.
    order = drawn_order(n, seed, device)
    order = order[~sure[order]]
    passed = (weights[order].double().cumsum(0) / share.clamp_min(1e-300) + 0.5).floor()
    hit = order[passed.diff(prepend=torch.zeros(1, dtype=passed.dtype, device=device)) > 0]
    sure[hit] = True
    raised = weights.clone()
    raised[hit] = share.to(weights.dtype)
    positions = torch.nonzero(sure).flatten()
    return positions, raised[positions]


def routed_slots(activations: LayerActivations, num_experts: int) -> list[tuple[Tensor, Tensor]]:
    """For each expert the (token, slot) index pairs that are routed to it."""
    flat = activations.top_k_index.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    k = activations.top_k_index.shape[1]
    pieces = order[: sum(counts)].split(counts)
    return [(piece // k, piece % k) for piece in pieces]


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
