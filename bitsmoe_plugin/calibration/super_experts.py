"""Super experts: the few whose output makes the massive activations that attention sinks rest on.

As defined by "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279): in
layers that form massive activations, experts whose largest output value is above the 99.5th percentile of
all experts' and above a tenth of the largest. Layers are judged by the residual stream, as massive
activations are ("Massive Activations in Large Language Models", arXiv 2402.17762: a thousand times the
median), so the rule needs no table of models. Tokens that a layer makes massive weigh more in its statistics
(``seen_by``), so that costs of rows tell what super experts need; which keep their original weights,
``super_expert_policy`` decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASSIVE = 1000.0
"""Largest value of a massive residual stream over its median."""
SHARE = 0.1
"""Of the largest value: what an expert must put out, and what a layer must add to form it."""
PERCENTILE = 0.995


@dataclass(frozen=True)
class ExpertOutputs:
    """Attributes:
    peaks: ``[E]`` float32, largest absolute output value of each expert, before the router's weight.
    massive: the layer forms massive activations.
    """

    peaks: Tensor
    massive: bool


def forms_massive_activations(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """True if a decoder layer makes the residual stream massive or adds much to it.

    Args:
        before, after: ``[blocks, tokens, ..., H]``, its inputs and outputs.
    """
    return any(bool(made.any()) for made in _made_massive(before, after))


def seen_by(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """By how many tokens each token's residual stream is seen, ``[T]`` float32.

    Tokens attend to those that a layer makes massive whatever they look for (attention sinks), so such a one
    is seen by all that follow in its block, and itself; another counts as seen by itself, 1. Weighed by the
    size of its residual stream alone a massive token would hardly count: by a hundred thousandth.

    Args:
        before, after: ``[blocks, tokens, ..., H]``, inputs and outputs of a decoder layer.
    """
    counts = []
    for made in _made_massive(before, after):
        following = torch.arange(made.shape[1], 0, -1, dtype=torch.float32, device=made.device)
        counts.append(torch.where(made, following, 1.0).flatten())
    return torch.cat([count.to(counts[0].device) for count in counts])


def _made_massive(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """Which tokens a decoder layer makes massive, ``[blocks, tokens]`` bool for each of ``after``."""
    # A model that is spread over devices gives a layer its inputs where the one before it is.
    added = [_peaks(out - x.to(out.device)) for x, out in zip(before, after, strict=True)]
    peaks = [_peaks(out) for out in after]
    largest = max(float(peak.max()) for peak in peaks)
    # The median of a part stands for that of all: it is compared with a thousandth.
    massive = MASSIVE * float(after[0].float().abs().median())
    return [(peak > massive) & (change > SHARE * largest) for peak, change in zip(peaks, added, strict=True)]


def _peaks(stream: Tensor) -> Tensor:
    """Largest absolute value of every token, ``[blocks, tokens]`` float32."""
    return stream.flatten(2).abs().amax(-1).float()


def detect(layers: Sequence[ExpertOutputs]) -> list[tuple[int, ...]]:
    """Ids of the super experts of every layer."""
    peaks = torch.cat([layer.peaks for layer in layers]).double()
    threshold = max(float(torch.quantile(peaks, PERCENTILE)), SHARE * float(peaks.max()))
    return [
        tuple(torch.nonzero(layer.peaks > threshold).flatten().tolist()) if layer.massive else ()
        for layer in layers
    ]
