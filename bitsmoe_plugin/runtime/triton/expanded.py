"""Products of very many tokens with packed rows: experts are expanded, some at a time, and multiplied.

A weight is then decoded once for all pairs of its expert, at the price of being written and read again in 16
bits. One scratch buffer holds gate and up, then down, of as many experts as fit. It comes from torch's
allocator and goes back with the call, so that all layers share it, CUDA graphs keep it in their pool, and
whoever measures memory by a call (vLLM does) sees it.
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
from bitsmoe_plugin.runtime.triton.target import Target


def experts_at_once(state: LayerState, operand: torch.dtype, target: Target) -> int:
    """Experts that the scratch buffer holds, one at least; all chunks but the last have as many."""
    most = max(1, target.scratch_bytes // _bytes_per_expert(state, operand))
    return triton.cdiv(state.experts, triton.cdiv(state.experts, most))


def scratch_bytes(state: LayerState, operand: torch.dtype, target: Target) -> int:
    """Size of the scratch buffer."""
    return experts_at_once(state, operand, target) * _bytes_per_expert(state, operand)


def _bytes_per_expert(state: LayerState, operand: torch.dtype) -> int:
    return state.inputs * state.rank * 32 * state.blocks * operand.itemsize


def outputs(
    z: Tensor, weights: Tensor, tiles: Tiles, state: LayerState, target: Target, launch: Launcher
) -> Tensor:
    """``[P, r]`` float32: each pair's output in rank space, weighted; unwritten for pairs of no expert.

    Args:
        z: ``[T, n * r]``, n input bases, in the dtype of the operands.
        weights: ``[T, k]``.
    """
    chunk, rank, columns = experts_at_once(state, z.dtype, target), state.rank, 32 * state.blocks
    scratch = z.new_empty((chunk, state.inputs, rank, columns))
    products = state.products(z, len(tiles.pairs))
    parts = z.new_empty((len(tiles.pairs), rank), dtype=torch.float32)
    sizes = target.blocks.dense
    constants = {"EXPERTS": state.experts, "INPUTS": state.inputs, "RANK": rank, "COLUMNS": columns}
    constants |= {"CHUNK": chunk, "TOKENS": tiles.size, "WIDE": sizes.columns, "STEP": sizes.step}
    own = {"BASES": state.bases(z), "SLOTS": tiles.slots, **state.gating_constants()}
    tall = len(tiles.expert)
    for first in range(0, state.experts, chunk):
        shared = {**tiles.pointers(), "lifts": state.lifts, "scratch": scratch, "first_expert": first}
        _expand(scratch, 0, state.inputs, first, tiles, state, target, launch)
        given = {"z": z, "hidden": products, "bias": state.bias, **shared}
        grid = triton.cdiv(columns, sizes.columns), tall
        launch(
            Launch(
                kernel=dense_gate_up_kernel,
                launch_grid=grid,
                arguments=given,
                constants=constants | own,
                num_warps=sizes.warps,
                num_stages=sizes.stages,
            )
        )
        hidden = state.gated(products, z.dtype)
        _expand(scratch, state.inputs, 1, first, tiles, state, target, launch)
        given = {"hidden": hidden, "weights": weights, "parts": parts, **shared}
        grid = triton.cdiv(rank, sizes.columns), tall
        launch(
            Launch(
                kernel=dense_down_kernel,
                launch_grid=grid,
                arguments=given,
                constants=constants,
                num_warps=sizes.warps,
                num_stages=sizes.stages,
            )
        )
    return parts


def _expand(
    scratch: Tensor,
    factor: int,
    factors: int,
    first: int,
    tiles: Tiles,
    state: LayerState,
    target: Target,
    launch: Launcher,
) -> None:
    """Write ``[len(scratch), factors, r, columns]`` of the experts from ``first`` on that have pairs."""
    tile = target.blocks.expand
    blocks = min(tile.blocks, triton.next_power_of_2(state.blocks))
    arguments = {"out": scratch, "ends": tiles.ends, "lifts": state.lifts, "first_expert": first}
    arguments |= {**state.pointers(), **state.scale_pointers(), "tables": state.tables}
    constants = state.constants() | {"UNITS": state.units, "ROWS": tile.rows, "BLOCKS": blocks}
    constants |= {"FACTOR": factor, "FACTORS": factors, "OPERAND": triton_dtype(scratch.dtype)}
    # Every width, and the dropped rows, have one tile of rows that may not be full.
    rows = state.rank // tile.rows + len(state.widths) + 1
    grid = (triton.cdiv(state.blocks, blocks), rows, len(scratch) * factors)
    launch(
        Launch(
            kernel=expand_rows_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=tile.warps,
        )
    )


@triton.jit
def expand_rows_kernel(
    out,
    ends,
    lifts,
    first_expert,
    payload,
    starts,
    counts,
    tile_scales,
    row_starts,
    order,
    row_codes,
    scale_grid,
    tables,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FACTOR: tl.constexpr,
    FACTORS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out[expert, factor, k] = row k times scale, unit and lift; 0 for dropped rows.

    Grid: column tiles, tiles of rows of one width, experts times factors.
    """
    expert = first_expert + tl.program_id(2) // FACTORS
    if expert >= EXPERTS:
        return
    begin = tl.load(ends + tl.maximum(expert - 1, 0))
    if tl.load(ends + expert) == tl.where(expert > 0, begin, 0):
        return
    factor = FACTOR + tl.program_id(2) % FACTORS
    unit = factor * EXPERTS + expert
    start = payload + tl.load(starts + unit)
    order += unit * RANK
    row_codes = own_scales(row_codes, row_starts, unit, RANK, GRID)
    tiles = own_tiles(tile_scales, row_starts, unit, ROW_BLOCKS, GRID)
    scale_grid += factor * 2 * RANK
    lift = tl.load(lifts + factor)
    out += tl.program_id(2).to(tl.int64) * (RANK * 32 * ROW_BLOCKS)
    block = tl.minimum(tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), ROW_BLOCKS - 1)
    column = tl.program_id(0) * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
    inside = (column < 32 * ROW_BLOCKS)[None, :]
    tile, done = tl.program_id(1), 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + unit * len(WIDTHS) + i)
        if (tile >= 0) & (tile * ROWS < count):
            rows = tile * ROWS + tl.arange(0, ROWS)
            has_row = rows < count
            row = tl.minimum(rows, count - 1)
            words = load_words(start + (row[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i], WIDTHS[i])
            k, scale = order_and_scales(order, row_codes, scale_grid, done + rows, has_row, RANK, GRID)
            of_tiles = load_scales(tiles, row, block, ROW_BLOCKS, GRID)
            values = decode_words(words, of_tiles, tables, WIDTHS[i], GRID, tl.float32)
            values *= (scale * (UNITS[i] * lift))[:, None]
            at = out + k[:, None] * (32 * ROW_BLOCKS) + column[None, :]
            tl.store(at, values.to(OPERAND), mask=has_row[:, None] & inside)
        start += count * (ROW_BLOCKS * WIDTHS[i])
        tiles += count * ((ROW_BLOCKS + 3) // 4)
        done += count
        tile -= tl.cdiv(count, ROWS)
    if tile >= 0:
        rows = done + tile * ROWS + tl.arange(0, ROWS)
        dropped = rows < RANK
        k = tl.load(order + rows, mask=dropped, other=0).to(tl.int32)
        zeros = tl.zeros([ROWS, 32 * BLOCKS], OPERAND)
        at = out + k[:, None] * (32 * ROW_BLOCKS) + column[None, :]
        tl.store(at, zeros, mask=dropped[:, None] & inside)


@triton.jit
def _dense_product(left, right, total, SIZE: tl.constexpr, RIGHT_STEP: tl.constexpr, STEP: tl.constexpr):
    """``total`` plus ``[m, SIZE]`` times ``[SIZE, n]``, given pointers to their first steps."""
    for first in range(0, SIZE, STEP):
        if SIZE % STEP == 0:
            a, b = tl.load(left), tl.load(right)
        else:
            keep = first + tl.arange(0, STEP) < SIZE
            a = tl.load(left, mask=keep[None, :], other=0.0)
            b = tl.load(right, mask=keep[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += STEP
        right += RIGHT_STEP
    return total


@triton.jit
def dense_gate_up_kernel(
    z,
    hidden,
    bias,
    pairs,
    ends,
    tile_expert,
    tile_first,
    lifts,
    scratch,
    first_expert,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
    BASES: tl.constexpr,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """As ``grouped.grouped_gate_up_kernel``, of the experts in the scratch buffer."""
    expert = tl.load(tile_expert + tl.program_id(1))
    local = expert - first_expert
    if (expert >= EXPERTS) | (local < 0) | (local >= CHUNK):
        return
    position = tl.load(tile_first + tl.program_id(1)) + tl.arange(0, TOKENS)
    keep = position < tl.load(ends + expert)
    token = (tl.load(pairs + position, mask=keep, other=0) // SLOTS).to(tl.int64)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    at_column = tl.minimum(column, COLUMNS - 1)
    scratch += local.to(tl.int64) * (INPUTS * RANK * COLUMNS)
    k = tl.arange(0, STEP)
    gate = tl.zeros([TOKENS, WIDE], tl.float32)
    up = tl.zeros([TOKENS, WIDE], tl.float32)
    for factor in tl.static_range(INPUTS):
        left = z + (token * (BASES * RANK) + factor * (BASES - 1) * RANK)[:, None] + k[None, :]
        right = scratch + factor * RANK * COLUMNS + k[:, None] * COLUMNS + at_column[None, :]
        sums = tl.zeros([TOKENS, WIDE], tl.float32)
        sums = _dense_product(left, right, sums, RANK, STEP * COLUMNS, STEP)
        gate, up = up, sums / tl.load(lifts + factor)
    inside = (column < SIZE)[None, :]
    if HAS_BIAS:
        if INPUTS == 2:
            gate = add_bias(gate, bias, expert, column[None, :], inside, 0, INPUTS, SIZE)
        up = add_bias(up, bias, expert, column[None, :], inside, INPUTS - 1, INPUTS, SIZE)
    here = keep[:, None] & (column < COLUMNS)[None, :]
    if len(FORM) > 0:
        value = tl.where(inside, gating(gate, up, FORM), 0.0)
        tl.store(hidden + position[:, None] * COLUMNS + column[None, :], value, mask=here)
    else:
        at = hidden + position[:, None] * (INPUTS * COLUMNS) + column[None, :]
        tl.store(at, gate, mask=here & (INPUTS == 2))
        tl.store(at + (INPUTS - 1) * COLUMNS, up, mask=here)


@triton.jit
def dense_down_kernel(
    hidden,
    weights,
    parts,
    pairs,
    ends,
    tile_expert,
    tile_first,
    lifts,
    scratch,
    first_expert,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """As ``grouped.grouped_down_kernel``, of the experts in the scratch buffer."""
    expert = tl.load(tile_expert + tl.program_id(1))
    local = expert - first_expert
    if (expert >= EXPERTS) | (local < 0) | (local >= CHUNK):
        return
    position = tl.load(tile_first + tl.program_id(1)) + tl.arange(0, TOKENS)
    last = tl.load(ends + expert)
    keep = position < last
    pair = tl.load(pairs + position, mask=keep, other=0)
    weight = tl.load(weights + pair, mask=keep, other=0.0).to(tl.float32) / tl.load(lifts + INPUTS)
    k = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    column = tl.arange(0, STEP)
    left = hidden + tl.minimum(position, last - 1)[:, None] * COLUMNS + column[None, :]
    right = scratch + local.to(tl.int64) * (RANK * COLUMNS) + column[:, None]
    right += (tl.minimum(k, RANK - 1) * COLUMNS)[None, :]
    sums = tl.zeros([TOKENS, WIDE], tl.float32)
    sums = _dense_product(left, right, sums, COLUMNS, STEP, STEP) * weight[:, None]
    tl.store(parts + pair[:, None] * RANK + k[None, :], sums, mask=keep[:, None] & (k < RANK)[None, :])
