"""Processes that quantize one model together, connected by torch.distributed.

Started by ``torchrun`` or ``accelerate launch``; all run the same program. In the first pass each plans every
so-manyth layer, in the second each rounds some groups of every layer's experts. What is computed, and in
what order it is summed, does not depend on how many there are. The first process, ``main``, keeps the
progress and writes the checkpoint.

Before anything is exchanged, all tell each other whether they have failed: an error in one (inside
``together``) ends all of them at once, with its reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.errors import BitsMoEError

T = TypeVar("T")
_TOLD = "_known_to_all_workers"
"""Attribute of errors that every process has raised."""


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

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, all processes fail if one does; it is left when all leave it.

        Raises:
            BaseException: what was raised here, or in the process of the lowest rank that failed.
        """
        try:
            yield
        except BaseException as error:
            if not getattr(error, _TOLD, False):
                self._tell(error)
            raise
        self._agree(None)

    def _tell(self, error: BaseException) -> None:
        """Let the others know at their next exchange, if they are still there."""
        try:
            self._agree(error)
        except BaseException as same:
            if same is not error and not getattr(same, _TOLD, False):
                warnings.warn(f"the other processes of torch.distributed are gone ({same})", stacklevel=3)
        setattr(error, _TOLD, True)

    def _agree(self, error: BaseException | None) -> None:
        """Raise what the process of the lowest rank that failed gives here; all call this together."""
        if self.size == 1:
            return
        errors: list[BaseException | None] = [None] * self.size
        dist.all_gather_object(errors, None if error is None else _portable(error))
        first = next(((rank, found) for rank, found in enumerate(errors) if found is not None), None)
        if first is None:
            return
        raised = error if error is not None and first[0] == self.rank else first[1]
        assert raised is not None
        setattr(raised, _TOLD, True)
        raise raised

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, or the error that it raises there."""
        if self.size == 1:
            return make()
        result: list[Any] = [None]
        error = None
        if self.main:
            try:
                result[0] = make()
            except Exception as raised:
                error = raised
        self._agree(error)
        dist.broadcast_object_list(result, src=0)
        value: T = result[0]
        return value

    def all(self, own: T) -> list[T]:
        """What every process gives, by rank."""
        if self.size == 1:
            return [own]
        self._agree(None)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own)
        return parts

    def merged(self, own: dict[int, T]) -> dict[int, T]:
        """The parts of all processes, by number."""
        together = {number: value for part in self.all(own) for number, value in part.items()}
        return dict(sorted(together.items()))


def _portable(error: BaseException) -> BaseException:
    """The error, or its text where other processes could not make the same from what it was made of."""
    known = isinstance(error, (BitsMoEError, Interrupted)) or type(error).__module__ == "builtins"
    if known and all(isinstance(part, (str, int, float, type(None))) for part in error.args):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


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
