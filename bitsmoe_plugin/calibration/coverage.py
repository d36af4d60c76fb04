"""How much calibration text is enough: how many of its tokens each expert sees."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.errors import QuantizationError

WANTED_TOKENS_PER_DIMENSION = 4
"""Of an expert on average. Unseen error of a layer of the bundled model at 0.67, 2.7 and 10.7 of them:
0.0502, 0.0246, 0.0172."""
THIN_TOKENS_PER_DIMENSION = 2
FEWEST_TOKENS, MOST_TOKENS = 131_072, 524_288
"""Between which the default is: time and memory grow with it (``bitsmoe estimate``)."""


def wanted_tokens(shapes: Sequence[LayerShape], experts_per_token: int | None) -> int:
    """Calibration tokens where none are asked for.

    Args:
        shapes: of the MoE layers.
        experts_per_token: that the router chooses, None: unknown.
    """
    each = max(WANTED_TOKENS_PER_DIMENSION * shape.hidden_size * shape.num_experts for shape in shapes)
    return min(MOST_TOKENS, max(FEWEST_TOKENS, each // (experts_per_token or each)))


def tokens_per_dimension(tokens: int, shape: LayerShape, experts_per_token: int) -> float:
    """Of an expert on average, over hidden_size."""
    return tokens * experts_per_token / shape.num_experts / shape.hidden_size


def warn_about_few_tokens(tokens: int, shapes: Sequence[LayerShape], experts_per_token: int | None) -> None:
    """Warns, before anything is computed, if there are too few for the average expert."""
    if experts_per_token is None:
        return
    shape = min(shapes, key=lambda shape: tokens_per_dimension(tokens, shape, experts_per_token))
    found = tokens_per_dimension(tokens, shape, experts_per_token)
    if found < THIN_TOKENS_PER_DIMENSION:
        fitting = THIN_TOKENS_PER_DIMENSION * shape.hidden_size * shape.num_experts // experts_per_token
        warnings.warn(
            f"{tokens:,} calibration tokens are {found:.2g} per expert and dimension (hidden_size "
            f"{shape.hidden_size}); from about {fitting:,} on errors on other text come close to the least "
            f"possible (calibration_tokens, and as much text)",
            stacklevel=3,
        )


def tokens_per_expert(activations: LayerActivations, shape: LayerShape) -> Tensor:
    """``[E]`` int64, tokens routed to each expert."""
    index = activations.top_k_index.flatten()
    return torch.bincount(index, minlength=shape.num_experts)[: shape.num_experts]


def warn_about_thin_calibration(name: str, activations: LayerActivations, shape: LayerShape) -> None:
    """Warns if an expert saw no token, or most saw too few though the average did not."""
    counts = tokens_per_expert(activations, shape)
    unrouted = torch.nonzero(counts == 0).flatten().tolist()
    if unrouted:
        warnings.warn(
            f"{name}: no calibration token was routed to expert {', '.join(map(str, unrouted))}; "
            "treated as typical experts of the layer. More or more varied calibration text helps, or "
            "all_experts=True.",
            stacklevel=2,
        )
    thin = THIN_TOKENS_PER_DIMENSION * shape.hidden_size
    if float(counts.float().median()) < thin <= float(counts.float().mean()):
        warnings.warn(
            f"{name}: the median expert saw {int(counts.float().median())} calibration tokens for "
            f"hidden_size {shape.hidden_size}, the one with fewest {int(counts.min())}; use more "
            "calibration text (calibration_tokens), or all_experts=True.",
            stacklevel=2,
        )


def refuse_thin_calibration(name: str, report: dict[str, Any], errors: Tensor) -> None:
    """Refuse a layer that is worse than none.

    Args:
        report: of the layer, with ``unseen_error``, the mean of the next, and ``output_energy``.
        errors: ``[tokens]`` of text that was held out; fewer than two tell nothing.

    Raises:
        QuantizationError: on text that no statistic saw, leaving its experts out would err less, by more than
            chance explains: two standard errors.
    """
    unseen, energy = report["unseen_error"], report["output_energy"]
    if len(errors) > 1 and unseen - 2 * float(errors.std()) / len(errors) ** 0.5 > energy > 0:
        raise QuantizationError(
            f"{name}: on text that no statistic saw, the quantized experts err by {unseen:.3g}, more than "
            f"the {energy:.3g} of leaving them out; give more calibration text (calibration_tokens), more "
            "bits, or --allow-thin, in Python allow_thin=True"
        )
