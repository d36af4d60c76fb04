"""Rows of down times the hidden units of one pair, a part of the rows per program of ``decode_output``."""

from __future__ import annotations

import triton
import triton.language as tl

from bitsmoe_plugin.runtime.triton.row_scales import load_scales, order_and_scales, own_scales, own_tiles
from bitsmoe_plugin.runtime.triton.rows import decode_words, load_words


@triton.jit
def _stored(counts, WIDTHS: tl.constexpr):
    """Rows of an expert's factor that are not dropped."""
    total = 0
    for i in tl.static_range(len(WIDTHS)):
        total += tl.load(counts + i)
    return total


@triton.jit
def _part(rows, part, parts, ROWS: tl.constexpr):
    """First row of a part and the one after its last; parts are whole steps but for the last."""
    each = tl.cdiv(tl.cdiv(rows, parts), ROWS) * ROWS
    return part * each, tl.minimum((part + 1) * each, rows)


@triton.jit
def down_part(
    hidden,
    ids,
    weights,
    parts,
    payload,
    starts,
    counts,
    tile_scales,
    row_starts,
    tables,
    order,
    row_codes,
    scale_grid,
    pair,
    part,
    splits,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """parts[pair, k] = router weight * <row k, hidden>, of one of ``splits`` parts of the rows.

    0 for dropped rows and pairs of no expert. Parts are equal numbers of stored rows, not of ranks: dropped
    rows take no time.
    """
    parts += pair * RANK
    expert = tl.load(ids + pair).to(tl.int32)
    if (expert < 0) | (expert >= EXPERTS):
        first, last = _part(RANK, part, splits, ROWS)
        for row in range(first, last, ROWS):
            rows = row + tl.arange(0, ROWS)
            tl.store(parts + rows, tl.zeros([ROWS], tl.float32), mask=rows < last)
        return
    unit = INPUTS * EXPERTS + expert
    counts += unit * len(WIDTHS)
    start = payload + tl.load(starts + unit)
    order += unit * RANK
    row_codes = own_scales(row_codes, row_starts, unit, RANK, GRID)
    tiles = own_tiles(tile_scales, row_starts, unit, ROW_BLOCKS, GRID)
    scale_grid += INPUTS * 2 * RANK
    hidden += pair * (32 * ROW_BLOCKS)
    weight = tl.load(weights + pair).to(tl.float32)
    stored = _stored(counts, WIDTHS)
    first, last = _part(stored, part, splits, ROWS)
    done = 0
    for i in tl.static_range(len(WIDTHS)):
        count = tl.load(counts + i)
        begin, end = tl.maximum(first - done, 0), tl.minimum(last - done, count)
        if begin < end:
            _down_rows(
                hidden,
                parts,
                start,
                tiles,
                tables,
                order,
                row_codes,
                scale_grid,
                done,
                begin,
                end,
                weight * UNITS[i],
                WIDTHS[i],
                RANK,
                ROW_BLOCKS,
                GRID,
                ROWS,
                BLOCKS,
                TILES,
            )
        start += count * (ROW_BLOCKS * WIDTHS[i])
        tiles += count * ((ROW_BLOCKS + 3) // 4)
        done += count
    first, last = _part(RANK - stored, part, splits, ROWS)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        k = tl.load(order + stored + rows, mask=rows < last, other=0).to(tl.int32)
        tl.store(parts + k, tl.zeros([ROWS], tl.float32), mask=rows < last)


@triton.jit
def _down_rows(
    hidden,
    parts,
    start,
    tiles,
    tables,
    order,
    row_codes,
    scale_grid,
    done,
    begin,
    end,
    weight,
    BITS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Rows ``begin`` to ``end`` of one width, which has ``done`` before it.

    In steps over rows and, within, tiles of columns.

    Rank indices and scales, a chain of loads, are fetched while the rows' products are computed.
    """
    lane, column = tl.arange(0, BLOCKS), tl.arange(0, 32 * BLOCKS)
    row = tl.minimum(begin + tl.arange(0, ROWS), end - 1)
    words = load_words(start + (row[:, None] * ROW_BLOCKS + tl.minimum(lane, ROW_BLOCKS - 1)) * BITS, BITS)
    k, scale = order_and_scales(order, row_codes, scale_grid, done + row, row >= 0, RANK, GRID)
    total = tl.zeros([ROWS], tl.float32)
    for step in range(0, tl.cdiv(end - begin, ROWS) * TILES):
        tile = step % TILES
        following = begin + (step + 1) // TILES * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(following, end - 1)
        block = tl.minimum((step + 1) % TILES * BLOCKS + lane, ROW_BLOCKS - 1)
        ahead = load_words(start + (row[:, None] * ROW_BLOCKS + block[None, :]) * BITS, BITS)
        k_ahead, scale_ahead = order_and_scales(
            order, row_codes, scale_grid, done + row, row >= 0, RANK, GRID
        )
        at = tile * (32 * BLOCKS) + column
        vector = tl.load(hidden + at, mask=at < 32 * ROW_BLOCKS, other=0.0)
        rows = begin + step // TILES * ROWS + tl.arange(0, ROWS)
        block = tl.minimum(tile * BLOCKS + lane, ROW_BLOCKS - 1)
        of_tiles = load_scales(tiles, tl.minimum(rows, end - 1), block, ROW_BLOCKS, GRID)
        values = decode_words(words, of_tiles, tables, BITS, GRID, tl.float32)
        total += tl.sum(values * vector[None, :], 1)
        tl.store(parts + k, total * (scale * weight), mask=(rows < end) & (tile == TILES - 1))
        total = tl.where(tile == TILES - 1, 0.0, total)
        words = ahead
        k, scale = k_ahead, scale_ahead
