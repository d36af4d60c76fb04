"""The coordinates as the products with rows of gate and up take them, written once before these.

Rows are stored by falling width, so their coordinates are gathered, and each row has a scale, found by a
chain of loads. Here that is done once for each tile of pairs, so that the products read straight on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.grouping import Tiles
from bitsmoe_plugin.runtime.triton.row_scales import order_and_scales, own_scales
from bitsmoe_plugin.runtime.triton.state import LayerState


def padded_rank(state: LayerState, rows: int) -> int:
    """Coordinates of one pair and factor, where the rows of each width are filled up to steps of ``rows``."""
    return (state.rank // rows + len(state.widths)) * rows


def scaled_coordinates(
    z: Tensor, tiles: Tiles, state: LayerState, operand: torch.dtype, rows: int, launch: Launcher
) -> Tensor:
    """``[inputs, P, padded_rank]`` of ``operand``: z times scale, unit and lift, in the order of the rows.

    Zero for the rows that fill up a width; beyond the last width, and for pairs of no expert, not written.

    Args:
        z: ``[T, n * r]``.
        rows: of a step of the product.
    """
    padded, chunk = padded_rank(state, rows), 256
    out = z.new_empty((state.inputs, len(tiles.pairs), padded), dtype=operand)
    arguments = {"z": z, "scaled": out, "lifts": state.lifts, "total": len(tiles.pairs)}
    arguments |= {**tiles.pointers(), "counts": state.counts, **state.scale_pointers()}
    arguments["row_starts"] = state.row_starts
    constants = {
        **{name: state.constants()[name] for name in ("EXPERTS", "RANK", "WIDTHS", "GRID")},
        "UNITS": state.units,
        "PADDED": padded,
        "BASES": state.bases(z),
        "SLOTS": tiles.slots,
        "TILE": tiles.size,
        "ROWS": rows,
        "PAIRS": 8,
        "CHUNK": chunk,
    }
    grid = (triton.cdiv(padded, chunk), len(tiles.expert), state.inputs)
    launch(
        Launch(
            kernel=scale_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=4,
        )
    )
    return out


@triton.jit
def _row_at(place, counts, WIDTHS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """Rows at places of the padded order, their units, and how many places there are.

    0 is the unit of a place without a row.
    """
    row = tl.zeros(place.shape, tl.int32)
    unit = tl.zeros(place.shape, tl.float32)
    first, done = 0, 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        inside = (place >= first) & (place < first + count)
        row = tl.where(inside, done + place - first, row)
        unit = tl.where(inside, UNITS[i], unit)
        first += tl.cdiv(count, ROWS) * ROWS
        done += count
    return row, unit, first


@triton.jit
def scale_kernel(
    z,
    scaled,
    lifts,
    total,
    pairs,
    ends,
    tile_expert,
    tile_first,
    counts,
    order,
    row_codes,
    scale_grid,
    row_starts,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    UNITS: tl.constexpr,
    PADDED: tl.constexpr,
    BASES: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``scaled_coordinates`` of a chunk of places (axis 0), a tile of pairs (1) and a factor (2)."""
    tile, factor = tl.program_id(1), tl.program_id(2)
    expert = tl.load(tile_expert + tile)
    if expert >= EXPERTS:
        return
    unit = factor * EXPERTS + expert
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row, scale, places = _row_at(place, counts + unit * len(WIDTHS), WIDTHS, UNITS, ROWS)
    if tl.program_id(0) * CHUNK >= places:
        return
    has_row = scale > 0
    grid = scale_grid + factor * 2 * RANK
    own = own_scales(row_codes, row_starts, unit, RANK, GRID)
    k, row_scale = order_and_scales(order + unit * RANK, own, grid, row, has_row, RANK, GRID)
    scale *= row_scale * tl.load(lifts + factor)
    z += factor * (BASES - 1) * RANK
    scaled += factor.to(tl.int64) * total * PADDED
    first = tl.load(tile_first + tile)
    last = tl.minimum(first + TILE, tl.load(ends + expert))
    for begin in range(first, last, PAIRS):
        position = begin + tl.arange(0, PAIRS)
        keep = position < last
        token = tl.load(pairs + position, mask=keep, other=0) // SLOTS
        at = z + token.to(tl.int64)[:, None] * (BASES * RANK) + k[None, :]
        value = tl.load(at, mask=keep[:, None] & has_row[None, :], other=0.0).to(tl.float32)
        at = scaled + position.to(tl.int64)[:, None] * PADDED + place[None, :]
        tl.store(at, value * scale[None, :], mask=keep[:, None] & (place < places)[None, :])
