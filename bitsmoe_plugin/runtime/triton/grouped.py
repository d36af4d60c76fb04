"""Products of tiles of pairs with packed rows, which are decoded into operands of ``tl.dot``.

Columns (gate, up) or rows (down) are the first axis of a product and pairs the second, because tensor cores
want 64 of the first and are content with 16 of the second. A step decodes the words that the step before it
has loaded. Nothing is masked: pointers stay on the last row, block or pair, ``scaled`` is zero for rows that
are not there, and results of what is not there are not stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.grouping import Tiles
from bitsmoe_plugin.runtime.triton.row_scales import load_scales, order_and_scales, own_scales, own_tiles
from bitsmoe_plugin.runtime.triton.rows import add_bias, decode_words, gating, load_words, triton_dtype
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Tile


def gate_up(scaled: Tensor, tiles: Tiles, state: LayerState, tile: Tile, launch: Launcher) -> Tensor:
    """``[P, 32 * blocks]``: hidden units of the pairs in the order of ``tiles``, 0 after the last.

    Args:
        scaled: see ``scaled.scaled_coordinates``, for steps of ``tile.rows``.
    """
    blocks = min(tile.blocks, triton.next_power_of_2(state.blocks))
    hidden = state.products(scaled, len(tiles.pairs))
    arguments = {"scaled": scaled, "hidden": hidden, "bias": state.bias, "lifts": state.lifts}
    arguments |= {**tiles.pointers(), **state.pointers(), "tables": state.tables_for(scaled.dtype)}
    arguments["total"] = len(tiles.pairs)
    constants = {
        **state.constants(),
        **state.gating_constants(),
        "PADDED": scaled.shape[2],
        "TOKENS": tiles.size,
        "ROWS": tile.rows,
        "BLOCKS": blocks,
        "OPERAND": triton_dtype(scaled.dtype),
    }
    grid = (triton.cdiv(state.blocks, blocks), len(tiles.expert))
    launch(
        Launch(
            kernel=grouped_gate_up_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=tile.warps,
        )
    )
    return state.gated(hidden, scaled.dtype)


def down(
    hidden: Tensor, weights: Tensor, tiles: Tiles, state: LayerState, tile: Tile, launch: Launcher
) -> Tensor:
    """``[P, r]`` float32: of each pair its router weight times rows of down times hidden units.

    Args:
        hidden: see ``gate_up``.
        weights: ``[T, k]``.
    """
    parts = hidden.new_empty((len(tiles.pairs), state.rank), dtype=torch.float32)
    arguments = {"hidden": hidden, "weights": weights, "parts": parts, **tiles.pointers()}
    arguments |= {**state.pointers(), **state.scale_pointers(), "tables": state.tables_for(hidden.dtype)}
    arguments["total"] = len(tiles.pairs)
    constants = {
        **state.constants(),
        "UNITS": state.units,
        "TOKENS": tiles.size,
        "ROWS": tile.rows,
        "BLOCKS": min(tile.blocks, triton.next_power_of_2(state.blocks)),
        "OPERAND": triton_dtype(hidden.dtype),
    }
    # Every width, and the dropped rows, have one tile of rows that may not be full.
    grid = (state.rank // tile.rows + len(state.widths) + 1, len(tiles.expert))
    launch(
        Launch(
            kernel=grouped_down_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=tile.warps,
        )
    )
    return parts


@triton.jit
def _outer_products(
    at,
    start,
    tiles,
    counts,
    tables,
    block,
    total,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``total`` ``[columns of the blocks, pairs]`` plus the sum of a factor's rows times their coordinates.

    ``at`` ``[ROWS, pairs]`` are pointers to the coordinates of the first step.
    """
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        if count > 0:
            row = tl.minimum(tl.arange(0, ROWS), count - 1)
            words = load_words(start + (row[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i], WIDTHS[i])
            for first in range(ROWS, count + ROWS, ROWS):
                row = tl.minimum(first + tl.arange(0, ROWS), count - 1)
                ahead = load_words(
                    start + (row[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i], WIDTHS[i]
                )
                coordinates = tl.load(at)
                row = tl.minimum(first - ROWS + tl.arange(0, ROWS), count - 1)
                scale = load_scales(tiles, row, block, ROW_BLOCKS, GRID)
                values = decode_words(words, scale, tables, WIDTHS[i], GRID, OPERAND)
                total = tl.dot(tl.trans(values), coordinates, total, input_precision="ieee")
                words = ahead
                at += ROWS
        start += count * (ROW_BLOCKS * WIDTHS[i])
        tiles += count * ((ROW_BLOCKS + 3) // 4)
    return total


@triton.jit
def grouped_gate_up_kernel(
    scaled,
    hidden,
    bias,
    lifts,
    pairs,
    ends,
    tile_expert,
    tile_first,
    payload,
    starts,
    counts,
    tile_scales,
    row_starts,
    tables,
    total,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """hidden[position in ``pairs``] = gating of gate and up with biases; 0 in the padding after ``SIZE``.

    Without a form gate and up themselves. Grid: column tiles, tiles of pairs.
    """
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert >= EXPERTS:
        return
    position = tl.load(tile_first + tl.program_id(1)) + tl.arange(0, TOKENS)
    keep = position < tl.load(ends + expert)
    pair = tl.minimum(position, total - 1).to(tl.int64)
    block = tl.minimum(tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), ROW_BLOCKS - 1)
    # A loop, not two calls: half the code, and half the compile time.
    gate = tl.zeros([32 * BLOCKS, TOKENS], tl.float32)
    up = tl.zeros([32 * BLOCKS, TOKENS], tl.float32)
    for factor in range(INPUTS):
        unit = factor * EXPERTS + expert
        at = scaled + ((factor * total + pair) * PADDED)[None, :] + tl.arange(0, ROWS)[:, None]
        start = payload + tl.load(starts + unit)
        sums = tl.zeros([32 * BLOCKS, TOKENS], tl.float32)
        sums = _outer_products(
            at,
            start,
            own_tiles(tile_scales, row_starts, unit, ROW_BLOCKS, GRID),
            counts + unit * len(WIDTHS),
            tables,
            block,
            sums,
            ROW_BLOCKS,
            WIDTHS,
            GRID,
            OPERAND,
            ROWS,
        )
        gate, up = up, sums / tl.load(lifts + factor)
    column = tl.program_id(0) * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
    inside = (column < SIZE)[:, None]
    if HAS_BIAS:
        if INPUTS == 2:
            gate = add_bias(gate, bias, expert, column[:, None], inside, 0, INPUTS, SIZE)
        up = add_bias(up, bias, expert, column[:, None], inside, INPUTS - 1, INPUTS, SIZE)
    COLUMNS: tl.constexpr = 32 * ROW_BLOCKS
    here = keep[:, None] & (column < COLUMNS)[None, :]
    if len(FORM) > 0:
        value = tl.where(inside, gating(gate, up, FORM), 0.0).to(OPERAND)
        tl.store(hidden + position[:, None] * COLUMNS + column[None, :], tl.trans(value), mask=here)
    else:
        at = hidden + position[:, None] * (INPUTS * COLUMNS) + column[None, :]
        tl.store(at, tl.trans(gate), mask=here & (INPUTS == 2))
        tl.store(at + (INPUTS - 1) * COLUMNS, tl.trans(up), mask=here)


@triton.jit
def _inner_products(
    hidden,
    start,
    tiles,
    row,
    tables,
    BITS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    GRID: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``[rows, pairs]`` float32: the rows of one width times hidden units at pointers ``[pairs]``."""
    total = tl.zeros([row.shape[0], hidden.shape[0]], tl.float32)
    start += row[:, None] * (ROW_BLOCKS * BITS)
    column = tl.arange(0, 32 * BLOCKS)
    block = tl.minimum(tl.arange(0, BLOCKS), ROW_BLOCKS - 1)
    words = load_words(start + block[None, :] * BITS, BITS)
    for first in range(0, ROW_BLOCKS, BLOCKS):
        block = tl.minimum(first + BLOCKS + tl.arange(0, BLOCKS), ROW_BLOCKS - 1)
        ahead = load_words(start + block[None, :] * BITS, BITS)
        at = hidden[None, :] + (first * 32 + column)[:, None]
        if ROW_BLOCKS % BLOCKS == 0:
            units = tl.load(at)
        else:
            units = tl.load(at, mask=(first * 32 + column < 32 * ROW_BLOCKS)[:, None], other=0.0)
        block = tl.minimum(first + tl.arange(0, BLOCKS), ROW_BLOCKS - 1)
        values = decode_words(
            words, load_scales(tiles, row, block, ROW_BLOCKS, GRID), tables, BITS, GRID, OPERAND
        )
        total = tl.dot(values, units, total, input_precision="ieee")
        words = ahead
    return total


@triton.jit
def grouped_down_kernel(
    hidden,
    weights,
    parts,
    pairs,
    ends,
    tile_expert,
    tile_first,
    payload,
    starts,
    counts,
    tile_scales,
    row_starts,
    order,
    row_codes,
    scale_grid,
    tables,
    total,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """parts[pair, k] = router weight * <row k, hidden>; 0 for dropped rows.

    Grid: tiles of rows, tiles of pairs. A tile has rows of one width, so a width's last is not full.
    """
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert >= EXPERTS:
        return
    position = tl.load(tile_first + tl.program_id(1)) + tl.arange(0, TOKENS)
    keep = position < tl.load(ends + expert)
    pair = tl.load(pairs + position, mask=keep, other=0)
    weight = tl.load(weights + pair, mask=keep, other=0.0).to(tl.float32)
    parts += pair * RANK
    hidden += tl.minimum(position, total - 1) * (32 * ROW_BLOCKS)
    unit = INPUTS * EXPERTS + expert
    start = payload + tl.load(starts + unit)
    order += unit * RANK
    row_codes = own_scales(row_codes, row_starts, unit, RANK, GRID)
    tiles = own_tiles(tile_scales, row_starts, unit, ROW_BLOCKS, GRID)
    tile, done = tl.program_id(0), 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + unit * len(WIDTHS) + i)
        if (tile >= 0) & (tile * ROWS < count):
            rows = tile * ROWS + tl.arange(0, ROWS)
            has_row = rows < count
            sums = _inner_products(
                hidden,
                start,
                tiles,
                tl.minimum(rows, count - 1),
                tables,
                WIDTHS[i],
                ROW_BLOCKS,
                GRID,
                OPERAND,
                BLOCKS,
            )
            k, scale = order_and_scales(
                order, row_codes, scale_grid + 2 * INPUTS * RANK, done + rows, has_row, RANK, GRID
            )
            sums *= weight[None, :] * (scale * UNITS[i])[:, None]
            tl.store(parts[None, :] + k[:, None], sums, mask=keep[None, :] & has_row[:, None])
        start += count * (ROW_BLOCKS * WIDTHS[i])
        tiles += count * ((ROW_BLOCKS + 3) // 4)
        done += count
        tile -= tl.cdiv(count, ROWS)
    if tile >= 0:
        rows = done + tile * ROWS + tl.arange(0, ROWS)
        dropped = rows < RANK
        k = tl.load(order + rows, mask=dropped, other=0).to(tl.int32)
        zeros = tl.zeros([ROWS, TOKENS], tl.float32)
        tl.store(parts[None, :] + k[:, None], zeros, mask=keep[None, :] & dropped[:, None])
