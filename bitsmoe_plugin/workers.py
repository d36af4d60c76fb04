"""Processes that quantize one model together, connected by torch.distributed.

Started by ``torchrun`` or ``accelerate launch``; all run the same program. In the first pass each plans every
so-manyth layer, in the second each rounds some groups of every layer's experts. What is computed, and in
what order it is summed, does not depend on how many there are. The first process, ``main``, keeps the
progress and writes the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The processes, as one of them sees them.

    Attributes:
        rank: number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def present() -> Workers:
        """Those of torch.distributed's default group, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return Workers(dist.get_rank(), dist.get_world_size())
        return Workers()

    @property
    def main(self) -> bool:
        """Whether this is the first one."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether the part with this number is this process's."""
        return number % self.size == self.rank

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, or the error that it raises there."""
        if self.size == 1:
            return make()
        result: list[Any] = [None, None]
        if self.main:
            try:
                result[0] = make()
            except Exception as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        value: T = result[0]
        return value

    def merged(self, own: dict[int, T]) -> dict[int, T]:
        """The parts of all processes, by number."""
        if self.size == 1:
            return own
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own)
        together = {number: value for part in parts for number, value in part.items()}
        return dict(sorted(together.items()))


ALONE = Workers()


@contextmanager
def connected() -> Iterator[Workers]:
    """The workers that torchrun has started this process as one of; on the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Workers.present()
        return
    dist.init_process_group("gloo")
    try:
        yield Workers.present()
    finally:
        dist.destroy_process_group()
