"""Widths of all rows of a model: one allocation, or several where budgets are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bitsmoe_plugin.allocation.dense_choice import as_unit
from bitsmoe_plugin.allocation.knapsack.solve import allocate
from bitsmoe_plugin.allocation.sub_budgets import RowGroup, in_scope, own_factors
from bitsmoe_plugin.codec.layout import LayerShape, row_sizes
from bitsmoe_plugin.config import BitsMoEConfig


def allocate_rows(
    costs: dict[int, Tensor],
    shapes: list[LayerShape],
    groups: list[RowGroup],
    config: BitsMoEConfig,
    kept: dict[int, tuple[int, ...]],
    dense: Sequence[tuple[Sequence[float], Sequence[int]]] = (),
) -> Widths:
    """Widths of all rows of all layers; one allocation for each group, or for each of its layers.

    Args:
        costs: ``[f, E, r, widths]`` of each layer, in the order of ``shapes``.
        groups: what rows may spend.
        kept: experts of each layer that have no rows.
        dense: cost and stored bits, at each of its candidates, of each unit of other layers that share the
            budget of the only group, which holds the least that they take apart.
    """
    indices, bits = list(costs), np.array(config.widths, dtype=np.uint8)
    rows = {
        index: torch.zeros(cost.shape[:-1], dtype=torch.uint8, device="cpu") for index, cost in costs.items()
    }
    gap, units = 0.0, tuple[int, ...]()
    for group in in_scope(groups, shapes, config):
        own = [indices[position] for position in group.layers]
        factors = [own_factors(group.factors, shapes[position]) for position in group.layers]
        tables = [_table(costs[index], some, kept[index]) for index, some in zip(own, factors, strict=True)]
        sizes = [row_sizes(shapes[position], config.widths) for position in group.layers]
        extra = [as_unit(*unit, len(config.widths)) for unit in dense]
        result = allocate(
            [*tables, *(table for table, _ in extra)],
            [*sizes, *(size for _, size in extra)],
            group.payload_bits + sum(size[0] for _, size in dense),
        )
        gap = max(gap, result.relative_gap)
        pieces = np.split(result.choice, np.cumsum([len(table) for table in tables]))
        units = tuple(int(choice) for choice in pieces.pop())
        for index, some, piece in zip(own, factors, pieces, strict=True):
            experts = torch.nonzero(experts_with_rows(costs[index], kept[index])).flatten()
            widths = torch.from_numpy(bits[piece]).view(len(some), len(experts), -1)
            rows[index][torch.tensor(some, device="cpu")[:, None], experts] = widths
    return Widths(rows, kept, gap, dense=units)


def experts_with_rows(costs: Tensor, kept: tuple[int, ...]) -> Tensor:
    """``[E]`` bool: the experts that have rows."""
    others = torch.ones(costs.shape[1], dtype=torch.bool, device=costs.device)
    others[list(kept)] = False
    return others


def _table(costs: Tensor, factors: list[int], kept: tuple[int, ...]) -> np.ndarray:
    """``[units, widths]``; no copy if all rows are asked for."""
    if len(factors) < len(costs):
        costs = costs[factors]
    costs = costs[:, experts_with_rows(costs, kept)] if kept else costs
    return costs.reshape(-1, costs.shape[-1]).numpy()


@dataclass(frozen=True)
class Widths:
    """Result of the allocation.

    Attributes:
        rows: index of the decoder layer -> ``[f, E, r]`` uint8, bits of each row.
        kept: index of the decoder layer -> experts that keep their original weights; their rows have 0 bits.
        relative_gap: see ``Allocation``; the largest, if there were several.
        super_experts: index of the decoder layer -> those that were found, kept or not.
        dense: candidate of each unit of other layers.
    """

    rows: dict[int, Tensor]
    kept: dict[int, tuple[int, ...]]
    relative_gap: float
    super_experts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    dense: tuple[int, ...] = ()
