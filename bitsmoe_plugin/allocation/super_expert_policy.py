"""Super experts: which keep their original weights.

The others are quantized like any expert: costs of their rows see what they do to tokens with massive
activations (``calibration.super_experts.seen_by``), so the allocation gives them what they need. Before,
when such tokens hardly weighed, it left them to luck: SmolLM2-135M cut into 240 experts at 2.0 bits, one of
them found, had perplexity 57.3 and 65.8 in two runs that hardly differ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from bitsmoe_plugin.allocation.budget import Budget, plan_budget, reserve
from bitsmoe_plugin.allocation.sub_budgets import RowGroup, StoredLayer, own_factors, sub_budgets
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_source import ExpertSource
from bitsmoe_plugin.models.families import layout_of

LARGEST_SHARE = 0.25
"""Of what any group of rows may spend, for super experts that nobody asked for; else the others suffer."""


def model_budget(source: ExpertSource, config: BitsMoEConfig) -> Budget:
    """``plan_budget`` of a model's layers and their biases.

    Raises:
        QuantizationError: see there and ``named_kept``; what is known beforehand to be too much for a budget.
    """
    budget = plan_budget(source.shapes, config, sum(bias_bits(source)))
    row_groups(source, config, budget, named_kept(source, config) or _none(source.layers))
    return budget


def row_groups(
    source: ExpertSource, config: BitsMoEConfig, budget: Budget, kept: list[tuple[int, ...]]
) -> list[RowGroup]:
    """What rows of a model may spend, together or, with ``layer_bits`` or ``projection_bits``, apart.

    Args:
        kept: experts of every layer that have no rows; what they take comes out of the budget.

    Raises:
        QuantizationError: see ``reserve`` and ``sub_budgets``.
    """
    bits = kept_bits(source, kept)
    layers = [
        StoredLayer(layer.name, shape, *sizes)
        for layer, shape, *sizes in zip(source.layers, source.shapes, bias_bits(source), bits, strict=True)
    ]
    return sub_budgets(layers, reserve(budget, "kept_experts", sum(bits)).payload_bits, config)


def named_kept(source: ExpertSource, config: BitsMoEConfig) -> list[tuple[int, ...]] | None:
    """Experts of every layer that the config names to keep their original weights; None if it names none.

    Raises:
        QuantizationError: the model lacks them, or rows have no width 0.
    """
    if not isinstance(config.super_experts, dict):
        return None
    names = [layer.name for layer in source.layers]
    kept = [tuple(sorted(set(config.super_experts.get(name, [])))) for name in names]
    sizes = {name: shape.num_experts for name, shape in zip(names, source.shapes, strict=True)}
    surplus = set(config.super_experts) - set(names)
    over = [name for name, ids in zip(names, kept, strict=True) if ids and ids[-1] >= sizes[name]]
    if surplus or over:
        known = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise QuantizationError(
            f"super_experts names {', '.join(sorted(surplus) or over)}, or experts of it, which the "
            f"model lacks; its layers are {known}"
        )
    _check_widths(kept, config)
    return kept


def choose_kept(
    source: ExpertSource, found: list[tuple[int, ...]], budget: Budget, config: BitsMoEConfig
) -> list[tuple[int, ...]]:
    """Experts of every layer that keep their original weights.

    With ``super_experts="auto"`` those that were found, if ``rounds_as_planned``: scales of Gaussian rows
    would clip what makes these experts super.

    Args:
        found: super experts of every layer.

    Raises:
        QuantizationError: see ``named_kept``.
    """
    kept = named_kept(source, config)
    if kept is not None or (config.super_experts == "auto" and not config.rounds_as_planned):
        return kept or _none(found)
    if config.super_experts == "auto":
        groups = row_groups(source, config, budget, _none(found))
        bits = kept_bits(source, found)
        found = _if_affordable(found, bits, groups, source.shapes, budget.weights)
    _check_widths(found, config)
    return found


def _none(layers: Sequence[Any]) -> list[tuple[int, ...]]:
    """No expert of any layer."""
    return [()] * len(layers)


def _if_affordable(
    found: list[tuple[int, ...]],
    bits: list[int],
    groups: list[RowGroup],
    shapes: list[LayerShape],
    weights: int,
) -> list[tuple[int, ...]]:
    """The experts ``found``, unless they take so much of what any group of rows may spend that the others
    suffer: in a model of few experts one takes the bits of many.

    Args:
        bits: what those of each layer take.
        shapes: of all layers.
        weights: of all experts.
    """
    for group in groups:
        taken = sum(
            bits[layer] * len(own_factors(group.factors, shapes[layer])) / len(shapes[layer].factors)
            for layer in group.layers
        )
        if taken > min(LARGEST_SHARE * group.payload_bits, group.payload_bits - group.narrowest):
            warnings.warn(
                f"{sum(map(len, found))} super experts are quantized like the others: in their original "
                f"precision they would take {sum(bits) / weights:.3f} bits per weight, over "
                f"{LARGEST_SHARE:.0%} of the budget, or more "
                'than is left beside the narrowest rows. super_experts="keep" keeps their original weights',
                stacklevel=3,
            )
            return _none(found)
    return found


def _check_widths(kept: list[tuple[int, ...]], config: BitsMoEConfig) -> None:
    if any(kept) and 0 not in config.widths:
        raise QuantizationError(
            f"experts are to keep their original weights, but widths={config.widths} has no 0 for their "
            "rows; add it, or switch it off with super_experts={}"
        )


def kept_bits(source: ExpertSource, kept: list[tuple[int, ...]]) -> list[int]:
    """What the weights of the kept experts of every layer take."""
    return [
        8 * dtype.itemsize * shape.weights * len(ids) // shape.num_experts
        for shape, dtype, ids in zip(source.shapes, source.dtypes, kept, strict=True)
    ]


def bias_bits(source: ExpertSource) -> list[int]:
    """What the biases of the experts of every layer take."""
    return [
        8 * dtype.itemsize * shape.num_experts * (shape.inputs * shape.intermediate_size + shape.hidden_size)
        if layout_of(layer.module).has_bias
        else 0
        for layer, shape, dtype in zip(source.layers, source.shapes, source.dtypes, strict=True)
    ]
