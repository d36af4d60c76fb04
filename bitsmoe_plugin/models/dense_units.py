"""Linear layers that a size budget chooses widths for, and what they take at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitsmoe_plugin.codec.dense import BITS, DenseScheme
from bitsmoe_plugin.models.dense_layers import fused_with, head_name, linear_layers, scheme_for
from bitsmoe_plugin.models.families import MoELayer

CANDIDATES = (*BITS, 16)
"""Widths of a unit; 16 stands for the dtype that it has."""


@dataclass(frozen=True)
class DenseUnit:
    """A linear layer, or those that vLLM computes as one: they get one width.

    Attributes:
        layer: index of the decoder layer.
        schemes: name of each -> how it is stored at each width below 16.
        sizes: stored bits at each of ``CANDIDATES``.
    """

    layer: int
    schemes: dict[str, dict[int, DenseScheme]]
    sizes: tuple[int, ...]


def dense_units(model: Any, layers: Sequence[MoELayer], config: Any) -> list[DenseUnit]:
    """The units of a model whose widths are to be chosen, in its order.

    Args:
        layers: with experts.
        config: BitsMoEConfig.
    """
    linear, head = linear_layers(model, layers), head_name(model)
    decoder = layers[0].layer_name.rpartition(".")[0] + "."
    found, done = [], set()
    for name in linear:
        if name == head or name in done:
            continue
        names = fused_with(name, linear)
        done.update(names)
        group = config.dense_group_size
        known: Any = {n: {bits: scheme_for(linear[n], bits, group) for bits in BITS} for n in names}
        if any(scheme is None for of in known.values() for scheme in of.values()):
            continue
        sizes = [sum(_stored(linear[n], known[n][bits]) for n in names) for bits in BITS]
        whole = sum(8 * linear[n].weight.element_size() * linear[n].weight.numel() for n in names)
        index = int(name.removeprefix(decoder).partition(".")[0])
        found.append(DenseUnit(index, known, (*sizes, whole)))
    return found


def _stored(module: nn.Linear, scheme: DenseScheme) -> int:
    """Bits of a layer: words, scales in its own dtype, and two numbers."""
    shapes = scheme.shapes(module.out_features, module.in_features)
    packed, scales, _ = (shape[0] * shape[-1] for shape in shapes.values())
    return 32 * packed + 8 * module.weight.element_size() * scales + 2 * 64
