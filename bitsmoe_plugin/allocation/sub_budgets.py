"""Budgets inside the budget: of single layers (``layer_bits``) and of projections (``projection_bits``).

They split the rows of a model into groups, each with bits of its own to spend. Groups do not overlap, so each
is allocated by itself, and what one is given is what it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import FACTORS, LayerShape, row_sizes
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError


@dataclass(frozen=True)
class StoredLayer:
    """What is known of a layer before its rows are allocated.

    Attributes:
        name: path of its experts.
        biases: bits they take.
        kept: bits of the experts that keep their original weights.
    """

    name: str
    shape: LayerShape
    biases: int = 0
    kept: int = 0


def own_factors(factors: Sequence[int], shape: LayerShape) -> list[int]:
    """Positions in a layer's first axis of those of the ``factors`` of a group that the layer has."""
    absent = len(FACTORS) - len(shape.factors)
    return [factor - absent for factor in factors if factor >= absent]


@dataclass(frozen=True)
class RowGroup:
    """Rows that share a budget.

    Attributes:
        layers: positions of their layers among all MoE layers.
        factors: their projections: 0 (gate), 1 (up), 2 (down); layers without a gate have no 0.
        payload_bits: what they may spend together.
        narrowest: the least they take.
        weights: what they stand for, in the unquantized model.
        given: ``payload_bits`` follows from ``layer_bits`` or ``projection_bits``, not from what is left.
    """

    layers: tuple[int, ...]
    factors: tuple[int, ...]
    payload_bits: int
    narrowest: int
    weights: int
    given: bool


def sub_budgets(layers: Sequence[StoredLayer], payload_bits: int, config: BitsMoEConfig) -> list[RowGroup]:
    """The groups of rows of a model; one of all rows unless ``layer_bits`` or ``projection_bits`` is given.

    Args:
        payload_bits: what the rows of all layers may spend.

    Raises:
        QuantizationError: a layer that the model lacks, or a budget that cannot be met.
    """
    unknown = sorted(set(config.layer_bits) - {layer.name for layer in layers})
    if unknown:
        raise QuantizationError(
            f"layer_bits names {', '.join(unknown)}, which the model lacks; its layers are "
            f"{', '.join(layer.name for layer in layers)}"
        )
    groups = [
        _named_layer(layers, i, config) for i, layer in enumerate(layers) if layer.name in config.layer_bits
    ]
    others = tuple(i for i, layer in enumerate(layers) if layer.name not in config.layer_bits)
    left = payload_bits - sum(group.payload_bits for group in groups)
    rest = _rows(layers, others, (0, 1, 2), left, False, config)
    if left < rest.narrowest:
        option, bits = _total(config)
        least = bits + (rest.narrowest - left) / sum(layer.shape.weights for layer in layers)
        raise QuantizationError(
            f"{option}={bits:g} is too little beside layer_bits: the smallest that leaves the layers it does "
            f"not name their narrowest rows is {least:.4f}; raise {option}, or lower layer_bits"
        )
    groups += [rest] if others else []
    return [part for group in groups for part in _by_projection(layers, group, config)]


def _total(config: BitsMoEConfig) -> tuple[str, float]:
    """The option that is the budget of the whole model, and its value."""
    if config.factor_bits is None:
        return "bits", float(config.bits)
    return "factor_bits", float(config.factor_bits)


def _rows(
    layers: Sequence[StoredLayer],
    chosen: tuple[int, ...],
    factors: tuple[int, ...],
    payload_bits: int,
    given: bool,
    config: BitsMoEConfig,
) -> RowGroup:
    shapes = [layers[i].shape for i in chosen]
    # Experts that are kept have no rows, but then rows may have width 0.
    counts = [len(own_factors(factors, shape)) for shape in shapes]
    rows = [shape.num_experts * shape.rank * min(row_sizes(shape, config.widths)) for shape in shapes]
    return RowGroup(
        layers=chosen,
        factors=factors,
        payload_bits=payload_bits,
        narrowest=sum(count * row for count, row in zip(counts, rows, strict=True)),
        weights=sum(_weights(factors, shape) for shape in shapes),
        given=given,
    )


def _weights(factors: tuple[int, ...], shape: LayerShape) -> int:
    """Weights that some projections of a layer have."""
    return len(own_factors(factors, shape)) * (shape.weights // len(shape.factors))


def _named_layer(layers: Sequence[StoredLayer], position: int, config: BitsMoEConfig) -> RowGroup:
    """All rows of a layer of ``layer_bits``."""
    layer = layers[position]
    parts = layout.fixed_bits(layer.shape, config.basis_bits, config.basis_group_size, config.input_bases)
    fixed = sum(parts.values()) + layer.biases + layer.kept
    if config.factor_bits is not None:
        fixed -= parts["bases"]
    bits, weights = config.layer_bits[layer.name], layer.shape.weights
    group = _rows(layers, (position,), (0, 1, 2), int(bits * weights) - fixed, True, config)
    if group.payload_bits < group.narrowest:
        raise QuantizationError(
            f"layer_bits gives {layer.name} {bits:g} bits per weight; the smallest reachable is "
            f"{(fixed + group.narrowest) / weights:.4f}, {fixed / weights:.4f} of it for all but rows"
        )
    return group


def _by_projection(layers: Sequence[StoredLayer], group: RowGroup, config: BitsMoEConfig) -> list[RowGroup]:
    """The group, split as ``projection_bits`` says."""
    if not config.projection_bits:
        return [group]
    named = [_named_projection(layers, group.layers, name, config) for name in config.projection_bits]
    others = tuple(i for i, name in enumerate(FACTORS) if name not in config.projection_bits)
    left = group.payload_bits - sum(part.payload_bits for part in named)
    rest = _rows(layers, group.layers, others, left, group.given, config)
    if left < rest.narrowest:
        needed = group.payload_bits - left + rest.narrowest
        where = layers[group.layers[0]].name if group.given else "all other layers"
        raise QuantizationError(
            f"projection_bits={config.projection_bits} needs {needed / group.weights:.4f} bits per weight "
            f"for the rows of {where}, which may spend {group.payload_bits / group.weights:.4f}; lower it, "
            f"or raise {'layer_bits' if group.given else _total(config)[0]}"
        )
    return [*named, rest] if others else named


def _named_projection(
    layers: Sequence[StoredLayer], chosen: tuple[int, ...], name: str, config: BitsMoEConfig
) -> RowGroup:
    """The rows of a projection of ``projection_bits``, in some layers."""
    fixed = 0
    having = [i for i in chosen if name in layers[i].shape.factors]
    if not having:
        raise QuantizationError(
            f"projection_bits names {name}, but the experts of {layers[chosen[0]].name} have no {name} "
            f"projection; they have {' and '.join(layers[chosen[0]].shape.factors)}"
        )
    for layer in (layers[i] for i in having):
        parts = layout.fixed_bits(layer.shape, config.basis_bits, config.basis_group_size, config.input_bases)
        fixed += (parts["row_codes"] + parts["scale_grids"] + layer.kept) // len(layer.shape.factors)
    bits = config.projection_bits[name]
    group = _rows(layers, chosen, (FACTORS.index(name),), 0, True, config)
    group = replace(group, payload_bits=int(bits * group.weights) - fixed)
    if group.payload_bits < group.narrowest:
        raise QuantizationError(
            f"projection_bits gives {name} {bits:g} bits per weight; the smallest reachable is "
            f"{(fixed + group.narrowest) / group.weights:.4f}, {fixed / group.weights:.4f} of it for row "
            "codes, scale grids and kept experts"
        )
    return group


def smallest_payload(groups: Sequence[RowGroup]) -> int:
    """The least that rows take without a change of ``layer_bits`` and ``projection_bits``."""
    return sum(group.payload_bits if group.given else group.narrowest for group in groups)


def each_layer(groups: Sequence[RowGroup], shapes: Sequence[LayerShape]) -> list[RowGroup]:
    """The groups with their budgets spread evenly over their layers, as ``scope="layer"`` wants it."""
    return [_only(group, shapes, i) for group in groups for i in group.layers]


def in_scope(groups: list[RowGroup], shapes: Sequence[LayerShape], config: BitsMoEConfig) -> list[RowGroup]:
    """The groups of rows that are allocated together."""
    return groups if config.scope == "global" else each_layer(groups, shapes)


def layer_share(groups: Sequence[RowGroup], shapes: Sequence[LayerShape], position: int) -> int:
    """What the rows of one layer may spend if each group spreads its budget evenly."""
    return sum(_only(group, shapes, position).payload_bits for group in groups if position in group.layers)


def _only(group: RowGroup, shapes: Sequence[LayerShape], position: int) -> RowGroup:
    """A layer's even share of the group."""
    weights = {i: _weights(group.factors, shapes[i]) for i in group.layers}
    own, total = weights[position], sum(weights.values())
    shares = {name: getattr(group, name) * own // total for name in ("payload_bits", "narrowest", "weights")}
    return replace(group, layers=(position,), **shares)
