"""Whether calibration text is enough: how many of its tokens each expert saw."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bitsmoe_plugin.calibration.statistics import LayerActivations
from bitsmoe_plugin.codec.layout import LayerShape

THIN_TOKENS_PER_DIMENSION = 0.25


def tokens_per_expert(activations: LayerActivations, shape: LayerShape) -> Tensor:
    """``[E]`` int64, tokens routed to each expert."""
    index = activations.top_k_index.flatten()
    return torch.bincount(index, minlength=shape.num_experts)[: shape.num_experts]


def warn_about_thin_calibration(name: str, activations: LayerActivations, shape: LayerShape) -> None:
    """Warns if an expert saw no token, or most saw too few."""
    counts = tokens_per_expert(activations, shape)
    unrouted = torch.nonzero(counts == 0).flatten().tolist()
    if unrouted:
        warnings.warn(
            f"{name}: no calibration token was routed to expert {', '.join(map(str, unrouted))}; "
            "treated as typical experts of the layer. More or more varied calibration text helps, or "
            "all_experts=True.",
            stacklevel=2,
        )
    if float(counts.float().median()) < THIN_TOKENS_PER_DIMENSION * shape.hidden_size:
        warnings.warn(
            f"{name}: the median expert saw {int(counts.float().median())} calibration tokens for "
            f"hidden_size {shape.hidden_size}, the one with fewest {int(counts.min())}; use more "
            "calibration text (calibration_tokens), or all_experts=True.",
            stacklevel=2,
        )
