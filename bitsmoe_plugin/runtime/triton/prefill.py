"""Triton kernels for many tokens: pairs are sorted by expert, rows are decoded into tiles for ``tl.dot``.

The sort and the table of tiles are computed on the device, and the launch covers the most tiles that
the number of pairs allows; programs without a tile end at once. So nothing waits for the host.

Decoded values are exact in the operands' dtype for rows of up to 8 bits (``rows``); the row
scales go to the coordinates (gate, up) or the result (down).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.decode import combine
from bitsmoe_plugin.runtime.triton.rows import add_bias, decode_rows, gating, order_and_scales
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target


@dataclass(frozen=True)
class Tiles:
    """Pairs (token * k + slot) grouped by expert and cut into tiles of one expert each.

    Attributes:
        pairs: ``[P]`` int32, by rising expert; those of no expert are last.
        ends: ``[E]`` int32, the position in ``pairs`` after the last of each expert.
        expert: ``[tiles]`` int32, of each tile; E for tiles that are not used.
        first: ``[tiles]`` int32, position in ``pairs`` of each tile's first.
    """

    pairs: Tensor
    ends: Tensor
    expert: Tensor
    first: Tensor


def group_pairs(ids: Tensor, experts: int, tile: int) -> Tiles:
    """Group the pairs of ``ids`` ``[T, k]`` without asking the device for a number."""
    device, total = ids.device, ids.numel()
    flat = ids.flatten().to(torch.int32)
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    ordered, pairs = torch.sort(flat, stable=True)
    edges = torch.searchsorted(ordered, torch.arange(experts + 1, dtype=torch.int32, device=device))
    needed = (edges.diff() + tile - 1) // tile
    ends = needed.cumsum(0)
    # Every expert with pairs has one tile that may not be full.
    number = torch.arange(total // tile + min(experts, total), device=device)
    expert = torch.searchsorted(ends, number, right=True)
    known = expert.clamp_max(experts - 1)
    first = edges[known] + (number - ends[known] + needed[known]) * tile
    return Tiles(*(t.to(torch.int32) for t in (pairs, edges[1:], expert, first)))


def coordinates(
    z: Tensor,
    ids: Tensor,
    weights: Tensor,
    state: LayerState,
    operand: torch.dtype,
    target: Target,
    launch: Launcher,
) -> Tensor:
    """As ``decode.coordinates``, with the dtype ``operand`` of the factors of matrix products."""
    sizes = target.blocks
    tiles = group_pairs(ids, state.experts, sizes.tokens)
    grouped = {
        "pairs": tiles.pairs,
        "ends": tiles.ends,
        "tile_expert": tiles.expert,
        "tile_first": tiles.first,
    }
    constants = state.constants() | {"TOKENS": sizes.tokens, "OPERAND": _triton_dtype(operand)}
    columns = 32 * state.blocks

    rows, blocks = sizes.gate_up
    blocks = min(blocks, triton.next_power_of_2(state.blocks))
    hidden = z.new_empty((ids.numel(), columns), dtype=operand)
    own = {"ROWS": rows, "BLOCKS": blocks, "BASES": state.bases(z), "TOP_K": ids.shape[1]}
    own |= state.gating_constants()
    launch_grid = (len(tiles.expert), triton.cdiv(state.blocks, blocks))
    arguments = {"z": z, "hidden": hidden, "bias": state.bias, **grouped, **state.pointers()}
    launch(
        Launch(
            kernel=grouped_gate_up_kernel,
            launch_grid=launch_grid,
            arguments=arguments,
            constants=constants | own,
            num_warps=sizes.gate_up_warps,
        )
    )

    rows, blocks = sizes.down
    parts = z.new_empty((ids.numel(), 1, state.rank))
    # Every width, and the dropped rows, have one tile of rows that may not be full.
    launch_grid = (len(tiles.expert), state.rank // rows + len(state.widths) + 1)
    own = {"ROWS": rows, "BLOCKS": min(blocks, triton.next_power_of_2(state.blocks))}
    arguments = {"hidden": hidden, "weights": weights, "parts": parts, **grouped, **state.pointers()}
    launch(
        Launch(
            kernel=grouped_down_kernel,
            launch_grid=launch_grid,
            arguments=arguments,
            constants=constants | own,
            num_warps=sizes.down_warps,
        )
    )
    return combine(parts, ids, state.experts, launch)


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def _rows_product(
    z,
    start,
    counts,
    order,
    row_codes,
    scale_grid,
    tables,
    token,
    keep_token,
    block,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    TRELLIS: tl.constexpr,
    BASES: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``[tokens, columns of the blocks]`` float32: sum over an expert's rows of z_k times row k."""
    total = tl.zeros([token.shape[0], 32 * block.shape[0]], tl.float32)
    done = 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        for row in range(0, count, ROWS):
            rows = row + tl.arange(0, ROWS)
            keep = rows < count
            at = start + (rows[:, None] * ROW_BLOCKS + block[None, :]) * WIDTHS[i]
            values = decode_rows(
                at, keep[:, None] & (block < ROW_BLOCKS)[None, :], tables, WIDTHS[i], TRELLIS
            )
            k, scale = order_and_scales(order, row_codes, scale_grid, done + rows, keep, RANK)
            at = z + token[:, None] * (BASES * RANK) + k[None, :]
            left = tl.load(at, mask=keep_token[:, None] & keep[None, :], other=0.0)
            left = (left * (scale * UNITS[i])[None, :]).to(OPERAND)
            total = tl.dot(left, values.to(OPERAND), total, input_precision="ieee")
        start += count * (ROW_BLOCKS * WIDTHS[i])
        done += count
    return total


@triton.jit
def grouped_gate_up_kernel(
    z,
    hidden,
    bias,
    pairs,
    ends,
    tile_expert,
    tile_first,
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
    TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BASES: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """hidden[position in ``pairs``] = gating of gate and up with biases; 0 in the padding after ``SIZE``.

    Grid: tiles of pairs, column tiles.
    """
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= EXPERTS:
        return
    position = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, TOKENS)
    keep = position < tl.load(ends + expert)
    token = tl.load(pairs + position, mask=keep, other=0) // TOP_K
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    # A loop, not two calls: half the code, and half the compile time.
    gate = tl.zeros([TOKENS, 32 * BLOCKS], tl.float32)
    up = tl.zeros([TOKENS, 32 * BLOCKS], tl.float32)
    for factor in range(INPUTS):
        unit = factor * EXPERTS + expert
        gate, up = (
            up,
            _rows_product(
                z + factor * (BASES - 1) * RANK,
                payload + tl.load(starts + unit),
                counts + unit * len(WIDTHS),
                order + unit * RANK,
                row_codes + unit * RANK,
                scale_grid + factor * 2 * RANK,
                tables,
                token,
                keep,
                block,
                RANK,
                ROW_BLOCKS,
                WIDTHS,
                UNITS,
                TRELLIS,
                BASES,
                OPERAND,
                ROWS,
            ),
        )
    column = tl.program_id(1) * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
    if HAS_BIAS:
        inside = (column < SIZE)[None, :]
        if INPUTS == 2:
            gate = add_bias(gate, bias, expert, column[None, :], inside, 0, INPUTS, SIZE)
        up = add_bias(up, bias, expert, column[None, :], inside, INPUTS - 1, INPUTS, SIZE)
    value = tl.where((column < SIZE)[None, :], gating(gate, up, FORM), 0.0)
    at = hidden + position[:, None] * (32 * ROW_BLOCKS) + column[None, :]
    tl.store(at, value, mask=keep[:, None] & (column < 32 * ROW_BLOCKS)[None, :])


@triton.jit
def _inner_products(
    hidden,
    start,
    rows,
    keep_rows,
    keep_pairs,
    tables,
    BITS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    TRELLIS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``[pairs, rows]`` float32: hidden at pointers ``[pairs]`` times the rows of one width."""
    total = tl.zeros([keep_pairs.shape[0], rows.shape[0]], tl.float32)
    for first in range(0, ROW_BLOCKS, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        column = first * 32 + tl.arange(0, 32 * BLOCKS)
        at = start + (rows[:, None] * ROW_BLOCKS + block[None, :]) * BITS
        values = decode_rows(at, keep_rows[:, None] & (block < ROW_BLOCKS)[None, :], tables, BITS, TRELLIS)
        keep = keep_pairs[:, None] & (column < 32 * ROW_BLOCKS)[None, :]
        left = tl.load(hidden[:, None] + column[None, :], mask=keep, other=0.0)
        total = tl.dot(left.to(OPERAND), tl.trans(values.to(OPERAND)), total, input_precision="ieee")
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
    TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """parts[pair, k] = router weight * <row k, hidden>; 0 for dropped rows.

    Grid: tiles of pairs, tiles of rows. A tile has rows of one width, so a width's last is not full.
    """
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= EXPERTS:
        return
    position = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, TOKENS)
    keep = position < tl.load(ends + expert)
    pair = tl.load(pairs + position, mask=keep, other=0)
    weight = tl.load(weights + pair, mask=keep, other=0.0).to(tl.float32)
    parts += pair * RANK
    hidden += position * (32 * ROW_BLOCKS)
    unit = INPUTS * EXPERTS + expert
    start = payload + tl.load(starts + unit)
    order += unit * RANK
    row_codes += unit * RANK
    tile, done = tl.program_id(1), 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + unit * len(WIDTHS) + i)
        if (tile >= 0) & (tile * ROWS < count):
            rows = tile * ROWS + tl.arange(0, ROWS)
            keep_rows = rows < count
            total = _inner_products(
                hidden,
                start,
                rows,
                keep_rows,
                keep,
                tables,
                WIDTHS[i],
                ROW_BLOCKS,
                TRELLIS,
                OPERAND,
                BLOCKS,
            )
            k, scale = order_and_scales(
                order, row_codes, scale_grid + 2 * INPUTS * RANK, done + rows, keep_rows, RANK
            )
            total *= weight[:, None] * (scale * UNITS[i])[None, :]
            tl.store(parts[:, None] + k[None, :], total, mask=keep[:, None] & keep_rows[None, :])
        start += count * (ROW_BLOCKS * WIDTHS[i])
        done += count
        tile -= tl.cdiv(count, ROWS)
    if tile >= 0:
        rows = done + tile * ROWS + tl.arange(0, ROWS)
        dropped = rows < RANK
        k = tl.load(order + rows, mask=dropped, other=0).to(tl.int32)
        zeros = tl.zeros([TOKENS, ROWS], tl.float32)
        tl.store(parts[:, None] + k[None, :], zeros, mask=keep[:, None] & dropped[None, :])
