"""Super experts: the few whose output makes the massive activations that attention sinks rest on.

As defined by "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279): in
layers that form massive activations, experts whose largest output value is above the 99.5th percentile of
all experts' and above a tenth of the largest. Layers are judged by the residual stream, as massive
activations are ("Massive Activations in Large Language Models", arXiv 2402.17762: a thousand times the
median), so the rule needs no table of models. What becomes of experts that are found, ``super_expert_policy``
decides."""

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
        before, after: ``[..., H]``, its inputs and outputs.
    """
    largest = max(float(out.abs().max()) for out in after)
    # A model that is spread over devices gives a layer its inputs where the one before it is.
    added = max(float((out - x.to(out.device)).abs().max()) for x, out in zip(before, after, strict=True))
    # The median of a part stands for that of all: it is compared with a thousandth.
    median = float(after[0].float().abs().median())
    return largest > MASSIVE * median and added > SHARE * largest


def detect(layers: Sequence[ExpertOutputs]) -> list[tuple[int, ...]]:
    """Ids of the super experts of every layer."""
    peaks = torch.cat([layer.peaks for layer in layers]).double()
    threshold = max(float(torch.quantile(peaks, PERCENTILE)), SHARE * float(peaks.max()))
    return [
        tuple(torch.nonzero(layer.peaks > threshold).flatten().tolist()) if layer.massive else ()
        for layer in layers
    ]
