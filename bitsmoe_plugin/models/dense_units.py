"""Linear layers that a size budget chooses widths for, and what they take at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitsmoe_plugin.base.sizes import header_bytes
from bitsmoe_plugin.codec.dense import BITS, GROUP_SIZES, DenseScheme
from bitsmoe_plugin.models.dense_layers import (
    free_layers,
    fused_with,
    head_name,
    linear_layers,
    savable_layers,
    scheme_for,
)
from bitsmoe_plugin.models.families import MoELayer

NO_LAYER = -1
"""In place of the index of a decoder layer, for what is in none: the head."""


@dataclass(frozen=True)
class DenseUnit:
    """A linear layer, or those that vLLM computes as one: they get one width.

    Attributes:
        layer: index of the decoder layer; ``NO_LAYER`` for the head.
        schemes: how each is stored, by name, at each candidate but the last: that is the dtype that it has.
        sizes: stored bits at each candidate, rising.
    """

    layer: int
    schemes: tuple[dict[str, DenseScheme], ...]
    sizes: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of its layers."""
        return tuple(self.schemes[0])

    def candidate(self, bits: int) -> int:
        """The first candidate of a width; 16 stands for the dtype that the unit has."""
        widths = [next(iter(schemes.values())).bits for schemes in self.schemes]
        return widths.index(bits) if bits in widths else len(widths)


def most_candidates(config: Any) -> int:
    """Of a unit."""
    return len(_kinds(config.dense_group_size)) + 1


def _kinds(group_size: int) -> list[tuple[int, int]]:
    """Bits and group sizes from the smallest; 8 bits lose so little that finer groups would not pay."""
    return [(4, size) for size in sorted({*GROUP_SIZES, group_size}, reverse=True) if size <= group_size] + [
        (bits, group_size) for bits in BITS if bits > 4
    ]


def dense_units(model: Any, layers: Sequence[MoELayer], config: Any) -> list[DenseUnit]:
    """The units of a model whose widths are to be chosen, in its order: those that ``dense_bits`` leaves open
    and whose sizes and names allow it. A head that is the embeddings too is none.

    Args:
        layers: with experts.
        config: BitsMoEConfig.
    """
    linear, head = linear_layers(model, layers), head_name(model)
    decoder = layers[0].layer_name.rpartition(".")[0] + "."
    free = free_layers(model, linear, config)
    free = savable_layers(model, free) if free else []
    found, done = [], set()
    for name in free:
        names = fused_with(name, linear)
        if name in done or not all(partner in free for partner in names):
            continue
        done.update(names)
        schemes = _schemes({n: linear[n] for n in names}, config.dense_group_size)
        if schemes:
            index = NO_LAYER if name == head else int(name.removeprefix(decoder).partition(".")[0])
            sizes = [sum(_stored(n, linear[n], own[n]) for n in names) for own in schemes]
            whole = sum(8 * (linear[n].weight.nbytes + _header(n, linear[n])) for n in names)
            found.append(DenseUnit(index, tuple(schemes), (*sizes, whole)))
    return found


def _schemes(modules: dict[str, nn.Linear], group_size: int) -> list[dict[str, DenseScheme]]:
    """Without those that are the same, where groups do not divide inputs; empty if sizes allow none."""
    found: list[dict[str, DenseScheme]] = []
    for bits, size in _kinds(group_size):
        own = {name: scheme_for(module, bits, size) for name, module in modules.items()}
        schemes = {name: scheme for name, scheme in own.items() if scheme is not None}
        if len(schemes) == len(own) and schemes not in found:
            found.append(schemes)
    return found


def _header(name: str, module: nn.Linear) -> int:
    return header_bytes(f"{name}.weight", module.weight.shape)


def _stored(name: str, module: nn.Linear, scheme: DenseScheme) -> int:
    """Bits of a layer: words, scales in its own dtype, two numbers; and what headers say of them."""
    shapes = scheme.shapes(module.out_features, module.in_features)
    packed, scales, _ = (shape[0] * shape[-1] for shape in shapes.values())
    headers = sum(header_bytes(f"{name}.{part}", shape) for part, shape in shapes.items())
    return 32 * packed + 8 * module.weight.element_size() * scales + 2 * 64 + 8 * headers
