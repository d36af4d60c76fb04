"""Products of few tokens with packed rows: each (token, slot) pair reads the rows of its expert once.

Nothing depends on the routing but the values: all shapes and grids follow from the sizes of the
arguments, no program waits for the host, and every sum has a fixed order.

A layer takes four launches, which each need all that the one before has written: ``matvec.scaled`` writes the
coordinates as each pair reads them, ``gate_up`` has whole columns and applies the gating, ``down`` has whole
rows, and ``matvec.summed`` sums over slots what it reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.rows import (
    add_bias,
    decode_words,
    gating,
    load_words,
    order_and_scales,
)
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target


def outputs(
    scaled: Tensor, ids: Tensor, weights: Tensor, state: LayerState, target: Target, launch: Launcher
) -> Tensor:
    """``[T * k, r]`` float32: the experts' outputs in rank space, weighted; 0 for slots of no expert.

    Args:
        scaled: ``[T * k, inputs, r]`` float32, see ``matvec.scaled``.
        ids: ``[T, k]`` integer; what is not one of the experts contributes nothing.
        weights: ``[T, k]``.
    """
    pairs, sizes = ids.numel(), target.blocks
    wanted = target.processors * sizes.programs_per_processor
    gate_up_warps, down_warps = sizes.decode_warps
    blocks = _blocks(wanted, pairs, state.blocks, sizes.decode_blocks)
    shared = {**state.constants(), **state.pointers()}
    names = ("payload", "starts", "counts")
    pointers = {name: shared.pop(name) for name in names} | {"tables": state.tables}

    hidden = scaled.new_empty((pairs, 32 * state.blocks))
    arguments = {"scaled": scaled, "ids": ids, "bias": state.bias, "hidden": hidden, **pointers}
    constants = {**shared, **state.gating_constants()}
    constants |= {"ROWS": max(1, 32 * gate_up_warps // blocks), "BLOCKS": blocks}
    grid = (triton.cdiv(state.blocks, blocks), pairs)
    launch(
        Launch(
            kernel=gate_up_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=gate_up_warps,
        )
    )

    blocks = _widest(state.blocks)
    rows = max(1, 32 * down_warps // blocks)
    splits = max(1, min(triton.cdiv(wanted, pairs), triton.cdiv(state.rank, rows)))
    parts = scaled.new_empty((pairs, state.rank))
    arguments = {"hidden": hidden, "ids": ids, "weights": weights, "parts": parts}
    arguments |= {**pointers, **state.scale_pointers()}
    constants = {**shared, "UNITS": state.units, "ROWS": rows, "BLOCKS": blocks}
    constants["TILES"] = triton.cdiv(state.blocks, blocks)
    launch(
        Launch(
            kernel=down_kernel,
            launch_grid=(splits, pairs),
            arguments=arguments,
            constants=constants,
            num_warps=down_warps,
        )
    )
    return parts


def _blocks(wanted: int, pairs: int, blocks: int, most: int) -> int:
    """The largest power of two of blocks per program that leaves ``wanted`` programs, or 1."""
    sizes = (2**i for i in reversed(range(most.bit_length())))
    return next((n for n in sizes if pairs * triton.cdiv(blocks, n) >= wanted), 1)


def _widest(blocks: int) -> int:
    """The power of two up to 32 that leaves the fewest lanes idle, the largest of several."""
    return min((2**i for i in range(6)), key=lambda n: (-(-blocks // n) * n, -n))


@triton.jit
def _sums(
    scaled,
    start,
    counts,
    tables,
    block,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TRELLIS: tl.constexpr,
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
                total += decode_words(words, tables, WIDTHS[i], TRELLIS, tl.float32) * z[:, None]
                words = ahead
                z = z_ahead
        start += count * (ROW_BLOCKS * WIDTHS[i])
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
    tables,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TRELLIS: tl.constexpr,
    SIZE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """hidden[pair] = gating of gate and up with biases; 0 in the padding after ``SIZE``.

    Grid: column tiles, pairs.
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
        sums = _sums(
            own, start, counts + unit * len(WIDTHS), tables, block, ROW_BLOCKS, WIDTHS, TRELLIS, ROWS
        )
        gate, up = up, sums
    column = tl.program_id(0) * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
    inside = column < SIZE
    if HAS_BIAS:
        if INPUTS == 2:
            gate = add_bias(gate, bias, expert, column, inside, 0, INPUTS, SIZE)
        up = add_bias(up, bias, expert, column, inside, INPUTS - 1, INPUTS, SIZE)
    value = tl.where(inside, gating(gate, up, FORM), 0.0)
    tl.store(hidden + pair * (32 * ROW_BLOCKS) + column, value, mask=column < 32 * ROW_BLOCKS)


@triton.jit
def _stored(counts, WIDTHS: tl.constexpr):
    """Rows of an expert's factor that are not dropped."""
    total = 0
    for i in tl.static_range(len(WIDTHS)):
        total += tl.load(counts + i)
    return total


@triton.jit
def _part(rows, ROWS: tl.constexpr):
    """First row of this program's part (axis 0) and the one after its last; parts are whole steps but for
    the last."""
    each = tl.cdiv(tl.cdiv(rows, tl.num_programs(0)), ROWS) * ROWS
    return tl.program_id(0) * each, tl.minimum((tl.program_id(0) + 1) * each, rows)


@triton.jit
def down_kernel(
    hidden,
    ids,
    weights,
    parts,
    payload,
    starts,
    counts,
    tables,
    order,
    row_codes,
    scale_grid,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TRELLIS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """parts[pair, k] = router weight * <row k, hidden>; 0 for dropped rows and pairs of no expert.

    Grid: parts of the rows, pairs. The parts are equal numbers of stored rows, not of ranks, so that dropped
    rows take no time.
    """
    pair = tl.program_id(1)
    parts += pair * RANK
    expert = tl.load(ids + pair).to(tl.int32)
    if (expert < 0) | (expert >= EXPERTS):
        first, last = _part(RANK, ROWS)
        for row in range(first, last, ROWS):
            rows = row + tl.arange(0, ROWS)
            tl.store(parts + rows, tl.zeros([ROWS], tl.float32), mask=rows < last)
        return
    unit = INPUTS * EXPERTS + expert
    counts += unit * len(WIDTHS)
    start = payload + tl.load(starts + unit)
    order += unit * RANK
    row_codes += unit * RANK
    scale_grid += INPUTS * 2 * RANK
    hidden += pair * (32 * ROW_BLOCKS)
    weight = tl.load(weights + pair).to(tl.float32)
    stored = _stored(counts, WIDTHS)
    first, last = _part(stored, ROWS)
    done = 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        begin, end = tl.maximum(first - done, 0), tl.minimum(last - done, count)
        if begin < end:
            _down_rows(
                hidden,
                parts,
                start,
                tables,
                order + done,
                row_codes,
                scale_grid,
                begin,
                end,
                weight * UNITS[i],
                WIDTHS[i],
                RANK,
                ROW_BLOCKS,
                TRELLIS,
                ROWS,
                BLOCKS,
                TILES,
            )
        start += count * (ROW_BLOCKS * WIDTHS[i])
        done += count
    first, last = _part(RANK - stored, ROWS)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        k = tl.load(order + stored + rows, mask=rows < last, other=0).to(tl.int32)
        tl.store(parts + k, tl.zeros([ROWS], tl.float32), mask=rows < last)


@triton.jit
def _down_rows(
    hidden,
    parts,
    start,
    tables,
    order,
    row_codes,
    scale_grid,
    begin,
    end,
    weight,
    BITS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    TRELLIS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Rows ``begin`` to ``end`` of one width, in steps over rows and, within, tiles of columns.

    Rank indices and scales, a chain of loads, are fetched while the rows' products are computed.
    """
    lane, column = tl.arange(0, BLOCKS), tl.arange(0, 32 * BLOCKS)
    row = tl.minimum(begin + tl.arange(0, ROWS), end - 1)
    words = load_words(start + (row[:, None] * ROW_BLOCKS + tl.minimum(lane, ROW_BLOCKS - 1)) * BITS, BITS)
    k, scale = order_and_scales(order, row_codes, scale_grid, row, row >= 0, RANK)
    total = tl.zeros([ROWS], tl.float32)
    for step in range(0, tl.cdiv(end - begin, ROWS) * TILES):
        tile = step % TILES
        following = begin + (step + 1) // TILES * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(following, end - 1)
        block = tl.minimum((step + 1) % TILES * BLOCKS + lane, ROW_BLOCKS - 1)
        ahead = load_words(start + (row[:, None] * ROW_BLOCKS + block[None, :]) * BITS, BITS)
        k_ahead, scale_ahead = order_and_scales(order, row_codes, scale_grid, row, row >= 0, RANK)
        at = tile * (32 * BLOCKS) + column
        vector = tl.load(hidden + at, mask=at < 32 * ROW_BLOCKS, other=0.0)
        total += tl.sum(decode_words(words, tables, BITS, TRELLIS, tl.float32) * vector[None, :], 1)
        rows = begin + step // TILES * ROWS + tl.arange(0, ROWS)
        tl.store(parts + k, total * (scale * weight), mask=(rows < end) & (tile == TILES - 1))
        total = tl.where(tile == TILES - 1, 0.0, total)
        words = ahead
        k, scale = k_ahead, scale_ahead
