"""Products of few tokens with packed rows: each (token, slot) pair reads the rows of its expert once.

Nothing depends on the routing but the values: all shapes and grids follow from the sizes of the
arguments, no program waits for the host, and every sum has a fixed order.

A layer takes three launches: ``matvec.scaled`` writes the coordinates as each pair reads them,
``hidden_units`` has whole columns and applies the gating, ``decode_output`` has whole rows of down and of the
output basis.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.row_scales import load_scales, own_tiles
from bitsmoe_plugin.runtime.triton.rows import add_bias, decode_words, gating, load_words
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target


def hidden_units(scaled: Tensor, ids: Tensor, state: LayerState, target: Target, launch: Launcher) -> Tensor:
    """``[T * k, 32 * blocks]`` float32: gating of gate and up; nothing is written for slots of no expert.

    Args:
        scaled: ``[T * k, inputs, r]`` float32, see ``matvec.scaled``.
        ids: ``[T, k]`` integer.
    """
    pairs, sizes = ids.numel(), target.blocks
    wanted, warps = target.processors * sizes.programs_per_processor, sizes.decode_warps[0]
    blocks = _blocks(wanted, pairs, state.blocks, sizes.decode_blocks)
    hidden = state.products(scaled, pairs)
    arguments = {"scaled": scaled, "ids": ids, "bias": state.bias, "hidden": hidden}
    arguments |= {**state.pointers(), "tables": state.tables}
    constants = {**state.constants(), **state.gating_constants()}
    constants |= {"ROWS": max(1, 32 * warps // blocks), "BLOCKS": blocks}
    grid = (triton.cdiv(state.blocks, blocks), pairs)
    launch(
        Launch(
            kernel=gate_up_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=warps,
        )
    )
    return state.gated(hidden, scaled.dtype)


def _blocks(wanted: int, pairs: int, blocks: int, most: int) -> int:
    """The largest power of two of blocks per program that leaves ``wanted`` programs, or 1."""
    sizes = (2**i for i in reversed(range(most.bit_length())))
    return next((n for n in sizes if pairs * triton.cdiv(blocks, n) >= wanted), 1)


@triton.jit
def _sums(
    scaled,
    start,
    tiles,
    counts,
    tables,
    block,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``[columns of the blocks]`` float32: sum of a factor's rows times their coordinates."""
    total = tl.zeros([ROWS, 32 * block.shape[0]], tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        if count > 0:
            row = tl.minimum(tl.arange(0, ROWS), count - 1)
            words = load_words(start + (row[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i], WIDTHS[i])
            z = tl.load(scaled + tl.arange(0, ROWS), mask=tl.arange(0, ROWS) < count, other=0.0)
            for first in range(ROWS, count + ROWS, ROWS):
                rows = first + tl.arange(0, ROWS)
                row = tl.minimum(rows, count - 1)
                ahead = load_words(
                    start + (row[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i], WIDTHS[i]
                )
                z_ahead = tl.load(scaled + rows, mask=rows < count, other=0.0)
                row = tl.minimum(rows - ROWS, count - 1)
                scale = load_scales(tiles, row, block, ROW_BLOCKS, GRID)
                total += decode_words(words, scale, tables, WIDTHS[i], GRID, tl.float32) * z[:, None]
                words = ahead
                z = z_ahead
        start += count * (ROW_BLOCKS * WIDTHS[i])
        tiles += count * ((ROW_BLOCKS + 3) // 4)
        scaled += count
    return tl.sum(total, 0)


@triton.jit
def gate_up_kernel(
    scaled,
    ids,
    bias,
    hidden,
    payload,
    starts,
    counts,
    tile_scales,
    row_starts,
    tables,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """hidden[pair] = gating of gate and up with biases; 0 in the padding after ``SIZE``.

    Without a form gate and up themselves. Grid: column tiles, pairs.
    """
    pair = tl.program_id(1)
    expert = tl.load(ids + pair).to(tl.int32)
    if (expert < 0) | (expert >= EXPERTS):
        return
    block = tl.minimum(tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), ROW_BLOCKS - 1)
    gate = tl.zeros([32 * BLOCKS], tl.float32)
    up = tl.zeros([32 * BLOCKS], tl.float32)
    for factor in range(INPUTS):
        unit = factor * EXPERTS + expert
        start = payload + tl.load(starts + unit)
        own = scaled + (pair * INPUTS + factor) * RANK
        tiles = own_tiles(tile_scales, row_starts, unit, ROW_BLOCKS, GRID)
        sums = _sums(
            own, start, tiles, counts + unit * len(WIDTHS), tables, block, ROW_BLOCKS, WIDTHS, GRID, ROWS
        )
        gate, up = up, sums
    column = tl.program_id(0) * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
    inside = column < SIZE
    if HAS_BIAS:
        if INPUTS == 2:
            gate = add_bias(gate, bias, expert, column, inside, 0, INPUTS, SIZE)
        up = add_bias(up, bias, expert, column, inside, INPUTS - 1, INPUTS, SIZE)
    COLUMNS: tl.constexpr = 32 * ROW_BLOCKS
    if len(FORM) > 0:
        value = tl.where(inside, gating(gate, up, FORM), 0.0)
        tl.store(hidden + pair * COLUMNS + column, value, mask=column < COLUMNS)
    else:
        at = hidden + pair * (INPUTS * COLUMNS) + column
        tl.store(at, gate, mask=(column < COLUMNS) & (INPUTS == 2))
        tl.store(at + (INPUTS - 1) * COLUMNS, up, mask=column < COLUMNS)
