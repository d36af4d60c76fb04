"""Scales of packed rows in Triton: of whole rows, and with the grid "tiled" of 128 values of each, too."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_and_scales(order, row_codes, scale_grid, position, keep, RANK: tl.constexpr, GRID: tl.constexpr):
    """Rank indices and scales (``scale_grid.ScaleGrid``, or the gains of the grid "tiled") of rows.

    ``order`` points to the factor of the expert, ``row_codes`` as ``own_scales`` says, ``scale_grid`` to that
    of the factor.
    """
    k = tl.load(order + position, mask=keep, other=0).to(tl.int32)
    if GRID == "tiled":
        return k, tl.load(row_codes + position, mask=keep, other=0.0).to(tl.float32)
    else:
        code = (tl.load(row_codes + k, mask=keep, other=0) & 31).to(tl.float32)
        low = tl.load(scale_grid + k, mask=keep, other=0.0).to(tl.float32)
        step = tl.load(scale_grid + RANK + k, mask=keep, other=0.0).to(tl.float32)
        return k, tl.exp2(low + code * step)


@triton.jit
def load_scales(tile_scales, row, block, ROW_BLOCKS: tl.constexpr, GRID: tl.constexpr):
    """Of the grid "tiled", the scales of blocks, ``[ROWS, BLOCKS]`` float32; nothing of others.

    ``tile_scales`` points to those of the first of the rows.
    """
    if GRID == "tiled":
        at = tile_scales + row[:, None] * ((ROW_BLOCKS + 3) // 4) + block[None, :] // 4
        return tl.load(at).to(tl.float32)
    else:
        return 0.0


@triton.jit
def own_scales(row_codes, row_starts, unit, RANK: tl.constexpr, GRID: tl.constexpr):
    """What ``LayerState.scale_pointers`` calls ``row_codes``, of a factor of an expert."""
    if GRID == "tiled":
        return row_codes + tl.load(row_starts + unit)
    else:
        return row_codes + unit * RANK


@triton.jit
def own_tiles(tile_scales, row_starts, unit, ROW_BLOCKS: tl.constexpr, GRID: tl.constexpr):
    """The scales of tiles of a factor of an expert."""
    if GRID == "tiled":
        return tile_scales + tl.load(row_starts + unit) * ((ROW_BLOCKS + 3) // 4)
    else:
        return tile_scales
