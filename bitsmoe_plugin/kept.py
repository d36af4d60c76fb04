"""What a packed layer stores as it was: super experts and biases; which they are, and what they take."""

from __future__ import annotations

from dataclasses import replace

import torch

from bitsmoe_plugin import packing
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.families import MoELayer, layer_shape, read_biases
from bitsmoe_plugin.packing import PackedExperts
from bitsmoe_plugin.spectral import ExpertBiases, ExpertWeights
from bitsmoe_plugin.super_experts import ExpertOutputs, detect


def choose_kept(
    layers: list[MoELayer], outputs: list[ExpertOutputs], config: BitsMoEConfig
) -> list[tuple[int, ...]]:
    """Experts of every layer that keep their original weights: detected, or as the config says.

    Raises:
        QuantizationError: the config names what the model lacks, or gives rows no width 0.
    """
    if config.super_experts == "auto":
        kept = detect(outputs)
    else:
        assert isinstance(config.super_experts, dict)
        chosen = {layer.name: config.super_experts.get(layer.name, []) for layer in layers}
        kept = [tuple(sorted(set(chosen[layer.name]))) for layer in layers]
        surplus = set(config.super_experts) - set(chosen)
        over = [
            layer.name for layer, ids in zip(layers, kept, strict=True) if ids and ids[-1] >= _experts(layer)
        ]
        if surplus or over:
            known = ", ".join(f"{layer.name} ({_experts(layer)})" for layer in layers)
            raise QuantizationError(
                f"super_experts names {', '.join(sorted(surplus) or over)}, or experts of it, which the "
                f"model lacks; its layers are {known}"
            )
    if any(kept) and 0 not in config.widths:
        raise QuantizationError(
            f"experts are to keep their original weights, but widths={config.widths} has no 0 for their "
            "rows; add it, or switch it off with super_experts={}"
        )
    return kept


def _experts(layer: MoELayer) -> int:
    return layer_shape(layer.module).num_experts


def kept_bits(layers: list[MoELayer], kept: list[tuple[int, ...]]) -> int:
    """What the weights of the kept experts take."""
    return sum(
        8
        * layer.module.down_proj.element_size()
        * layer_shape(layer.module).weights
        * len(ids)
        // _experts(layer)
        for layer, ids in zip(layers, kept, strict=True)
    )


def bias_bits(layers: list[MoELayer]) -> int:
    """What the biases of all experts take."""
    biases = [read_biases(layer.module) for layer in layers]
    return sum(8 * t.numel() * t.element_size() for b in biases if b for t in vars(b).values())


def with_originals(
    packed: PackedExperts, weights: ExpertWeights, biases: ExpertBiases | None, kept: tuple[int, ...]
) -> PackedExperts:
    """The packed layer with what is stored of it as it was: biases, and the experts ``kept``."""
    found = {}
    if biases is not None:
        found = {"input_bias": torch.stack([biases.gate, biases.up], 1), "output_bias": biases.down}
    if kept:
        ids = list(kept)
        found["kept_input"] = torch.stack([weights.gate[ids], weights.up[ids]], 1)
        found["kept_output"] = weights.down[ids]
    return replace(packed, **{name: packing.store_bits(tensor) for name, tensor in found.items()})
