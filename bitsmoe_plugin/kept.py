"""What a packed layer stores as it was: super experts and biases; which they are, and what they take."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from bitsmoe_plugin import packing
from bitsmoe_plugin.budget import Budget, plan_budget, reserve
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.families import layout_of
from bitsmoe_plugin.packing import PackedExperts
from bitsmoe_plugin.sources import ExpertSource
from bitsmoe_plugin.spectral import ExpertBiases, ExpertWeights
from bitsmoe_plugin.sub_budgets import RowGroup, StoredLayer, sub_budgets

LARGEST_SHARE = 0.25
"""Of the budget, for super experts that nobody asked to keep. SmolLM2-135M cut into 240 experts, 2 of them
kept, which takes 0.27 of 2.0 bits in float32: perplexity 61.6, 61.8 and 62.3 in three runs that hardly
differ, 57.3 and 65.8 in two with all quantized: keeping them costs bits, and takes away the risk. In
Qwen3-30B-A3B 3 of 6,144 experts take 0.008 bits."""


def model_budget(source: ExpertSource, config: BitsMoEConfig) -> Budget:
    """``plan_budget`` of a model's layers and their biases.

    Raises:
        QuantizationError: see there and ``named_kept``; what is known beforehand to be too much for a budget.
    """
    budget = plan_budget(source.shapes, config, sum(bias_bits(source)))
    row_groups(source, config, budget, named_kept(source, config) or [()] * len(source.layers))
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

    With ``super_experts="auto"`` those that were found, unless they take so much of the budget that the
    others suffer: in a model of few experts one in 16 bits takes the bits of many.

    Args:
        found: super experts of every layer.

    Raises:
        QuantizationError: see ``named_kept``.
    """
    kept = named_kept(source, config)
    if kept is not None:
        return kept
    if config.super_experts == "auto" and _take_too_much(source, found, budget, config):
        bits = sum(kept_bits(source, found))
        warnings.warn(
            f"{sum(map(len, found))} super experts are quantized like the others: in their original "
            f"precision they would take {bits / budget.weights:.3f} bits per weight, over "
            f'{LARGEST_SHARE:.0%} of the budget. super_experts="keep" keeps them',
            stacklevel=2,
        )
        return [()] * len(found)
    _check_widths(found, config)
    return found


def _take_too_much(
    source: ExpertSource, found: list[tuple[int, ...]], budget: Budget, config: BitsMoEConfig
) -> bool:
    """True if the experts ``found`` would take more than their share of what any group of rows may spend."""
    bits = kept_bits(source, found)
    for group in row_groups(source, config, budget, [()] * len(found)):
        taken = sum(bits[layer] for layer in group.layers) * len(group.factors) / len(packing.FACTORS)
        if taken > LARGEST_SHARE * group.payload_bits:
            return True
    return False


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
        8 * dtype.itemsize * shape.num_experts * (2 * shape.intermediate_size + shape.hidden_size)
        if layout_of(layer.module).has_bias
        else 0
        for layer, shape, dtype in zip(source.layers, source.shapes, source.dtypes, strict=True)
    ]


def with_originals(
    packed: PackedExperts, weights: ExpertWeights, biases: ExpertBiases | None, kept: tuple[int, ...]
) -> PackedExperts:
    """The packed layer, on the CPU, with what is stored of it as it was: biases, and the experts ``kept``."""
    found = {}
    if biases is not None:
        found = {"input_bias": torch.stack([biases.gate, biases.up], 1), "output_bias": biases.down}
    if kept:
        ids = list(kept)
        found["kept_input"] = torch.stack([weights.gate[ids], weights.up[ids]], 1)
        found["kept_output"] = weights.down[ids]
    return replace(packed, **{name: packing.store_bits(tensor).cpu() for name, tensor in found.items()})
