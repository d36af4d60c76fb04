"""Pairs (token * k + slot) sorted by expert, and cut into tiles of one expert each, on the device.

Nothing waits for the host: the launches cover the most tiles that the number of pairs allows, and programs
without a tile end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher


@dataclass(frozen=True)
class Tiles:
    """Grouped pairs.

    Attributes:
        pairs: ``[P]`` int32, by rising expert, then as they come; after the last of an expert nothing is
            written, so there may be any number.
        ends: ``[E]`` int32, the position in ``pairs`` after the last of each expert.
        expert: ``[tiles]`` int32, of each tile; E for tiles that are not used.
        first: ``[tiles]`` int32, position in ``pairs`` of each tile's first.
        size: pairs of a tile, at most.
        slots: pairs of a token.
    """

    pairs: Tensor
    ends: Tensor
    expert: Tensor
    first: Tensor
    size: int
    slots: int

    def pointers(self) -> dict[str, Tensor]:
        """What every kernel over tiles takes."""
        return {
            "pairs": self.pairs,
            "ends": self.ends,
            "tile_expert": self.expert,
            "tile_first": self.first,
        }


def group_pairs(ids: Tensor, experts: int, tile: int, launch: Launcher) -> Tiles:
    """Group the pairs of ``ids`` ``[T, k]`` integer into tiles of at most ``tile``."""
    total = ids.numel()
    # Every expert with pairs has one tile that may not be full.
    most = total // tile + min(experts, total)
    pairs, ends, expert, first = (
        ids.new_empty(size, dtype=torch.int32) for size in (total, experts, most, most)
    )
    tiles = Tiles(pairs=pairs, ends=ends, expert=expert, first=first, size=tile, slots=ids.shape[1])
    arguments = {"ids": ids, **tiles.pointers(), "total": total}
    constants = {"EXPERTS": experts, "TILE": tile, "CHUNK": 1024}
    launch(
        Launch(
            kernel=group_kernel,
            launch_grid=(experts,),
            arguments=arguments,
            constants=constants,
            num_warps=4,
        )
    )
    return tiles


@triton.jit
def group_kernel(
    ids,
    pairs,
    ends,
    tile_expert,
    tile_first,
    total,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The pairs and tiles of one expert (axis 0), by a pass that counts and one that writes.

    No program knows the counts of the others, so it numbers its tiles from ``_first_tile`` on, which leaves
    room for all and marks what it does not need.
    """
    expert = tl.program_id(0)
    before = tl.zeros([CHUNK], tl.int32)
    own = tl.zeros([CHUNK], tl.int32)
    for first in range(0, total, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        id = tl.load(ids + pair, mask=pair < total, other=-1)
        before += ((id >= 0) & (id < expert)).to(tl.int32)
        own += (id == expert).to(tl.int32)
    start, count = tl.sum(before), tl.sum(own)
    tl.store(ends + expert, start + count)

    tile = _first_tile(start, expert, TILE)
    # The last takes those that are left, too.
    tiles = total // TILE + tl.minimum(EXPERTS, total)
    end = tl.where(expert == EXPERTS - 1, tiles, _first_tile(start + count, expert + 1, TILE))
    for first in range(0, end - tile, CHUNK):
        number = first + tl.arange(0, CHUNK)
        keep = number < end - tile
        used = number * TILE < count
        tl.store(tile_expert + tile + number, tl.where(used, expert, EXPERTS), mask=keep)
        tl.store(tile_first + tile + number, start + number * TILE, mask=keep)

    position = start
    for first in range(0, total, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        mine = tl.load(ids + pair, mask=pair < total, other=-1) == expert
        place = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(pairs + position + place - 1, pair, mask=mine)
        position += tl.sum(mine.to(tl.int32))


@triton.jit
def _first_tile(start, expert, TILE: tl.constexpr):
    """A tile that no earlier expert needs, if ``start`` pairs are before: as many full tiles as those have,
    and one that may not be full for each of these experts that can have a pair."""
    return start // TILE + tl.minimum(expert, start)
