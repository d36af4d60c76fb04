"""The costs of all units of a model, read in chunks so that no second copy of them is ever made.

Qwen3-30B-A3B has 37.7 million units; at 8 widths their costs take 1.2 GB in float32 as they come, and
would take 2.4 GB more in float64 and as much again for a table of sizes. So costs stay in the blocks
(layers) and the dtype they come in, all units of a block share one row of sizes, and a pass converts a
chunk at a time. Sums are taken in float64 and do not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitsmoe_plugin.errors import QuantizationError

CHUNK = 2**14
"""Units per chunk: its tables of 1 MiB stay in a core's cache. 2**13 to 2**16 take equally long."""
_THREADS = min(8, os.cpu_count() or 1)
_TIE = 1e-12
"""Choices whose costs at a price differ by less, relatively, count as equally cheap."""

Costs = NDArray[np.floating[Any]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Choices = NDArray[np.uint8]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Units:
    """Some units, widths first, so that numpy's inner loops are long.

    Attributes:
        costs: ``[widths, units]`` float64; infinity or NaN forbids a choice.
        sizes: ``[widths, units]``, or ``[widths, 1]`` if all are alike, int64, rising along widths.
    """

    costs: Floats
    sizes: Ints

    def __len__(self) -> int:
        return self.costs.shape[1]

    def choose(self, price: float) -> tuple[Choices, Floats]:
        """Cheapest choice per unit at a price per bit, of equally cheap ones the smallest.

        Returns:
            choice ``[units]`` and the least cost at the price ``[units]``.
        """
        priced = self.costs + price * self.sizes
        least = np.fmin.reduce(priced, axis=0)
        tied = priced <= least * (1 + _TIE)
        choice = np.zeros(len(self), dtype=np.uint8)
        for width in reversed(range(len(tied))):
            np.copyto(choice, np.uint8(width), where=tied[width])
        return choice, least

    def take(self, choice: Choices) -> tuple[Floats, Ints]:
        """Cost and size of a choice, each ``[units]``."""
        index = choice[None].astype(np.intp)
        sizes = np.broadcast_to(self.sizes, self.costs.shape)
        return np.take_along_axis(self.costs, index, 0)[0], np.take_along_axis(sizes, index, 0)[0]

    def size(self, choice: Choices) -> int:
        """Bits that a choice takes."""
        return int(self.take(choice)[1].sum())

    def pick(self, wanted: NDArray[Any]) -> Units:
        """Some of the units, by index or mask."""
        return Units(self.costs[:, wanted], np.broadcast_to(self.sizes, self.costs.shape)[:, wanted])


class CostTables:
    """Costs and sizes of all units, in blocks.

    Attributes:
        units: number of units.
        sizes: ``[blocks, widths]`` int64.
        widths: number of widths.
    """

    def __init__(self, costs: Sequence[Costs], sizes: Sequence[Sequence[int] | Ints]) -> None:
        """
        Args:
            costs: for each block ``[units, widths]``, float32 or float64.
            sizes: for each block ``[widths]``, bits that a unit of it stores at each width, rising.

        Raises:
            QuantizationError: the shapes do not fit each other, or sizes do not rise.
        """
        self._blocks = [np.asarray(block) for block in costs]
        self.sizes = np.array([np.asarray(row) for row in sizes], dtype=np.int64)
        shapes = [block.shape for block in self._blocks]
        if self.sizes.ndim != 2 or len(shapes) != len(self.sizes) or not len(shapes):
            raise QuantizationError(f"{len(shapes)} blocks of costs and sizes of shape {self.sizes.shape}")
        self.widths = self.sizes.shape[1]
        if any(len(shape) != 2 or shape[1] != self.widths for shape in shapes):
            raise QuantizationError(f"costs of shapes {shapes} do not fit {self.widths} sizes per block")
        if bool((np.diff(self.sizes, axis=1) <= 0).any()):
            raise QuantizationError("sizes must rise along the widths")
        if not any(shape[0] for shape in shapes):
            raise QuantizationError("there are no units to allocate bits to")
        self._starts = np.cumsum([0, *(len(block) for block in self._blocks)])
        self.units = int(self._starts[-1])
        self._chunks = [
            (block, start, min(start + CHUNK, len(costs)))
            for block, costs in enumerate(self._blocks)
            for start in range(0, len(costs), CHUNK)
        ]

    def map(self, function: Callable[[Units, slice], Result]) -> list[Result]:
        """Results of ``function(units, positions)`` for every chunk, in order.

        Args:
            function: called from several threads, with the chunk and where its units stand among all.
        """

        def run(chunk: tuple[int, int, int]) -> Result:
            block, start, stop = chunk
            table = self._blocks[block][start:stop].T.astype(np.float64, order="C")
            first = int(self._starts[block])
            return function(Units(table, self.sizes[block][:, None]), slice(first + start, first + stop))

        if len(self._chunks) == 1:
            return [run(self._chunks[0])]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(run, self._chunks))

    def gather(self, chosen: Ints) -> Units:
        """The tables of some units, ``[n]`` rising positions among all."""
        ends = np.searchsorted(chosen, self._starts)
        tables, sizes = [], []
        for block, costs in enumerate(self._blocks):
            local = chosen[ends[block] : ends[block + 1]] - self._starts[block]
            tables.append(costs[local].T.astype(np.float64))
            sizes.append(np.broadcast_to(self.sizes[block][:, None], (self.widths, len(local))))
        return Units(np.concatenate(tables, axis=1), np.concatenate(sizes, axis=1))
