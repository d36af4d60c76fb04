"""Triton kernels for few tokens: each (token, slot) pair reads the rows of its expert once.

Nothing depends on the routing but the values: all shapes and grids follow from the sizes of the
arguments, no program waits for the host, and every sum has a fixed order.

One program takes the columns of some blocks and one part of the rows of one pair's factor. The parts
are equal numbers of stored rows, not of ranks, so that dropped rows take no time.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.rows import add_bias, decode_rows, gating, order_and_scales
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import BlockSizes, Target


def coordinates(
    z: Tensor, ids: Tensor, weights: Tensor, state: LayerState, target: Target, launch: Launcher
) -> Tensor:
    """The experts' outputs in rank space, weighted by the router and summed over each token's experts.

    Args:
        z: ``[T, n * r]`` float32, n input bases, T > 0.
        ids: ``[T, k]`` integer; what is not one of the experts contributes nothing.
        weights: ``[T, k]``.

    Returns:
        ``[T, r]`` float32.
    """
    pairs, sizes = ids.numel(), target.blocks
    arguments: dict[str, Any]
    constants: dict[str, Any]
    blocks = _blocks_per_program(state.blocks, sizes)
    tiles = triton.cdiv(state.blocks, blocks)
    rows = max(1, sizes.lanes // blocks)
    shared = {**state.constants(), "ROWS": rows, "BLOCKS": blocks}
    wanted = target.processors * sizes.programs_per_processor
    most = triton.cdiv(state.rank, rows)

    inputs = state.inputs
    splits = _splits(wanted, inputs * pairs * tiles, most)
    columns = 32 * state.blocks
    partial = z.new_empty((splits, pairs, inputs, columns))
    arguments = {"z": z, "ids": ids, "partial": partial, **state.pointers()}
    constants = {**shared, "TOP_K": ids.shape[1], "BASES": state.bases(z)}
    launch(
        Launch(
            kernel=gate_up_kernel,
            launch_grid=(pairs, inputs * tiles, splits),
            arguments=arguments,
            constants=constants,
            num_warps=sizes.decode_warps,
        )
    )

    hidden = z.new_empty((pairs, columns))
    arguments = {"partial": partial, "ids": ids, "bias": state.bias, "hidden": hidden, "splits": splits}
    constants = {"COLUMNS": columns, "EXPERTS": state.experts, "INPUTS": inputs, "TILE": 1024}
    constants |= state.gating_constants()
    launch(
        Launch(
            kernel=activate_kernel,
            launch_grid=(pairs, triton.cdiv(columns, 1024)),
            arguments=arguments,
            constants=constants,
            num_warps=4,
        )
    )

    splits = _splits(wanted, pairs * tiles, most)
    parts = z.new_empty((pairs, tiles, state.rank))
    arguments = {"hidden": hidden, "ids": ids, "weights": weights, "parts": parts, **state.pointers()}
    launch(
        Launch(
            kernel=down_kernel,
            launch_grid=(pairs, tiles, splits),
            arguments=arguments,
            constants=shared,
            num_warps=sizes.decode_warps,
        )
    )
    return combine(parts, ids, state.experts, launch)


def combine(parts: Tensor, ids: Tensor, experts: int, launch: Launcher) -> Tensor:
    """``[T, r]`` float32: ``parts`` ``[T * k, tiles, r]`` summed over tiles and slots with an expert."""
    tokens, slots = ids.shape
    _, tiles, rank = parts.shape
    total = parts.new_empty((tokens, rank))
    arguments = {"parts": parts, "ids": ids, "total": total}
    constants = {"EXPERTS": experts, "RANK": rank, "SLOTS": slots, "TILES": tiles, "TILE": 1024}
    launch(
        Launch(
            kernel=combine_kernel,
            launch_grid=(tokens, triton.cdiv(rank, 1024)),
            arguments=arguments,
            constants=constants,
            num_warps=4,
        )
    )
    return total


def _blocks_per_program(blocks: int, sizes: BlockSizes) -> int:
    """The power of two that leaves the fewest lanes idle, the largest of several."""
    candidates = [2**i for i in range(sizes.blocks.bit_length())]
    return min(candidates, key=lambda n: (-(-blocks // n) * n, -n))


def _splits(wanted: int, programs: int, most: int) -> int:
    """Parts of the rows that bring ``programs`` to the number wanted, with a step's rows each at least."""
    return max(1, min(triton.cdiv(wanted, programs), most))


@triton.jit
def _stored(counts, WIDTHS: tl.constexpr):
    """Rows of an expert's factor that are not dropped."""
    total = 0
    for i in tl.static_range(len(WIDTHS)):
        total += tl.load(counts + i)
    return total


@triton.jit
def _part(rows, split, splits, ROWS: tl.constexpr):
    """First row of a part and the one after its last; parts are whole steps but for the last."""
    each = tl.cdiv(tl.cdiv(rows, splits), ROWS) * ROWS
    return split * each, tl.minimum((split + 1) * each, rows)


@triton.jit
def gate_up_kernel(
    z,
    ids,
    partial,
    payload,
    starts,
    counts,
    order,
    row_codes,
    scale_grid,
    tables,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    TRELLIS: tl.constexpr,
    BASES: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """partial[split, pair, factor]: sum of z_k times row k over a part of the rows, for some columns.

    Grid: pairs, factors times column tiles, splits.
    """
    pair, split = tl.program_id(0), tl.program_id(2)
    factor, tile = tl.program_id(1) % INPUTS, tl.program_id(1) // INPUTS
    expert = tl.load(ids + pair)
    if (expert < 0) | (expert >= EXPERTS):
        return
    unit = factor * EXPERTS + expert.to(tl.int32)
    z += (pair // TOP_K) * (BASES * RANK) + (factor * (BASES - 1)) * RANK
    counts += unit * len(WIDTHS)
    start = payload + tl.load(starts + unit)
    order += unit * RANK
    row_codes += unit * RANK
    scale_grid += factor * 2 * RANK
    first, last = _part(_stored(counts, WIDTHS), split, tl.num_programs(2), ROWS)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    total = tl.zeros([ROWS, 32 * BLOCKS], tl.float32)
    done = 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        for row in range(tl.maximum(first - done, 0), tl.minimum(last - done, count), ROWS):
            rows = row + tl.arange(0, ROWS)
            keep = rows < tl.minimum(last - done, count)
            at = start + (rows[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i]
            values = decode_rows(
                at, keep[:, None] & (block < ROW_BLOCKS)[None, :], tables, WIDTHS[i], TRELLIS
            )
            k, scale = order_and_scales(order, row_codes, scale_grid, done + rows, keep, RANK)
            factor_z = tl.load(z + k, mask=keep, other=0.0) * (scale * UNITS[i])
            total += values * factor_z[:, None]
        start += count * (ROW_BLOCKS * WIDTHS[i])
        done += count
    column = tile * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
    at = ((split * tl.num_programs(0) + pair) * INPUTS + factor) * (32 * ROW_BLOCKS) + column
    tl.store(partial + at, tl.sum(total, 0), mask=column < 32 * ROW_BLOCKS)


@triton.jit
def activate_kernel(
    partial,
    ids,
    bias,
    hidden,
    splits,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    """hidden[pair] = gating of the summed splits plus biases; 0 in the padding after ``SIZE``.

    Grid: pairs, column tiles.
    """
    pair = tl.program_id(0)
    expert = tl.load(ids + pair)
    if (expert < 0) | (expert >= EXPERTS):
        return
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = column < SIZE
    gate = tl.zeros([TILE], tl.float32)
    up = tl.zeros([TILE], tl.float32)
    for split in range(splits):
        at = partial + (split * tl.num_programs(0) + pair) * (INPUTS * COLUMNS) + column
        if INPUTS == 2:
            gate += tl.load(at, mask=keep, other=0.0)
        up += tl.load(at + (INPUTS - 1) * COLUMNS, mask=keep, other=0.0)
    if HAS_BIAS:
        if INPUTS == 2:
            gate = add_bias(gate, bias, expert, column, keep, 0, INPUTS, SIZE)
        up = add_bias(up, bias, expert, column, keep, INPUTS - 1, INPUTS, SIZE)
    value = tl.where(keep, gating(gate, up, FORM), 0.0)
    tl.store(hidden + pair * COLUMNS + column, value, mask=column < COLUMNS)


@triton.jit
def down_kernel(
    hidden,
    ids,
    weights,
    parts,
    payload,
    starts,
    counts,
    order,
    row_codes,
    scale_grid,
    tables,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    TRELLIS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """parts[pair, tile, k] = router weight * <row k, hidden> over the tile's columns; 0 for dropped rows.

    Grid: pairs, column tiles, splits.
    """
    pair, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(ids + pair)
    if (expert < 0) | (expert >= EXPERTS):
        return
    unit = INPUTS * EXPERTS + expert.to(tl.int32)
    counts += unit * len(WIDTHS)
    start = payload + tl.load(starts + unit)
    order += unit * RANK
    row_codes += unit * RANK
    scale_grid += INPUTS * 2 * RANK
    parts += (pair * tl.num_programs(1) + tile) * RANK
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    column = tile * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
    vector = tl.load(
        hidden + pair * (32 * ROW_BLOCKS) + column, mask=column < 32 * ROW_BLOCKS, other=0.0
    ) * tl.load(weights + pair).to(tl.float32)
    stored = _stored(counts, WIDTHS)
    first, last = _part(stored, split, tl.num_programs(2), ROWS)
    done = 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        for row in range(tl.maximum(first - done, 0), tl.minimum(last - done, count), ROWS):
            rows = row + tl.arange(0, ROWS)
            keep = rows < tl.minimum(last - done, count)
            at = start + (rows[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i]
            values = decode_rows(
                at, keep[:, None] & (block < ROW_BLOCKS)[None, :], tables, WIDTHS[i], TRELLIS
            )
            k, scale = order_and_scales(order, row_codes, scale_grid, done + rows, keep, RANK)
            tl.store(parts + k, tl.sum(values * vector[None, :], 1) * (scale * UNITS[i]), mask=keep)
        start += count * (ROW_BLOCKS * WIDTHS[i])
        done += count
    first, last = _part(RANK - stored, split, tl.num_programs(2), ROWS)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        k = tl.load(order + stored + rows, mask=rows < last, other=0).to(tl.int32)
        tl.store(parts + k, tl.zeros([ROWS], tl.float32), mask=rows < last)


@triton.jit
def combine_kernel(
    parts,
    ids,
    total,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """total[token]: the parts of its slots in order, but of those with no expert. Grid: tokens, tiles."""
    token = tl.program_id(0)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    result = tl.zeros([TILE], tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(ids + pair)
        if (expert >= 0) & (expert < EXPERTS):
            for tile in range(TILES):
                result += tl.load(parts + (pair * TILES + tile) * RANK + k, mask=k < RANK, other=0.0)
    tl.store(total + token * RANK + k, result, mask=k < RANK)
