"""Products of many tokens with packed rows: pairs are sorted by expert and cut into tiles of one expert each.

Rows are decoded anew for each tile (``grouped``), or experts are expanded (``expanded``) where most would be
decoded for several tiles. Which of the two follows from the numbers of tokens, slots and experts alone.

Nothing waits for the host, and nothing but values depends on the routing: grids and sizes follow from the
numbers of tokens, slots and experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launcher
from bitsmoe_plugin.runtime.triton import expanded, grouped
from bitsmoe_plugin.runtime.triton.combine import combine
from bitsmoe_plugin.runtime.triton.grouping import group_pairs
from bitsmoe_plugin.runtime.triton.scaled import padded_rank, scaled_coordinates
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target


def bytes_per_token(state: LayerState, slots: int, tokens: int, operand: torch.dtype, target: Target) -> int:
    """Of what is computed between the bases in a call of ``tokens`` tokens: hidden units and outputs of each
    token's experts, and scaled coordinates where experts are not expanded."""
    values = 32 * state.blocks
    if not target.expands(tokens * slots, state.experts, operand):
        rows = max(tile.rows for tile in target.blocks.gate_up.values())
        values += state.inputs * padded_rank(state, rows)
    between = 0 if state.form else 2 * 4 * state.inputs * 32 * state.blocks  # products, and what torch makes
    return slots * (operand.itemsize * values + 4 * state.rank + between)


def coordinates(
    z: Tensor,
    ids: Tensor,
    weights: Tensor,
    state: LayerState,
    operand: torch.dtype,
    target: Target,
    launch: Launcher,
) -> Tensor:
    """The experts' outputs in rank space, weighted by the router and summed over each token's experts.

    Args:
        z: ``[T, n * r]``, n input bases, T > 0: float32, or ``operand`` where experts are expanded.
        ids: ``[T, k]`` integer; what is not one of the experts contributes nothing.
        weights: ``[T, k]``.
        operand: dtype of the factors of matrix products.

    Returns:
        ``[T, r]`` in dtype ``operand``, summed in float32.
    """
    if target.expands(ids.numel(), state.experts, operand):
        tiles = group_pairs(ids, state.experts, 128, launch)
        parts = expanded.outputs(z, weights, tiles, state, target, launch)
    else:
        size = target.blocks.pairs_per_tile(ids.numel(), state.experts)
        tiles = group_pairs(ids, state.experts, size, launch)
        tile = target.blocks.gate_up[size]
        scaled = scaled_coordinates(z, tiles, state, operand, tile.rows, launch)
        hidden = grouped.gate_up(scaled, tiles, state, tile, launch)
        parts = grouped.down(hidden, weights, tiles, state, target.blocks.down[size], launch)
    return combine(parts, ids, state.experts, operand, launch)
