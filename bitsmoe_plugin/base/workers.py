"""Processes that quantize one model together, connected by torch.distributed.

Started by ``torchrun`` or ``accelerate launch``; all run the same program. In the first pass each plans every
so-manyth layer, in the second each rounds some groups of every layer's experts. What is computed, and in
what order it is summed, does not depend on how many there are. The first process, ``main``, keeps the
progress and writes the checkpoint.

An error in one (inside ``together``) ends all of them, with its reason: in the middle of their work, see
``worker_watch``, and with the next exchange at the latest, for before anything is exchanged, all tell each
other whether they have failed. One that is killed is missed as soon.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from bitsmoe_plugin.base.error_lines import ToldError
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.worker_errors import is_known_to_all, known_to_all, was_stopped
from bitsmoe_plugin.base.worker_links import gathered
from bitsmoe_plugin.base.worker_watch import Watch, exchange, watched
from bitsmoe_plugin.errors import BitsMoEError, ConfigError

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

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, all processes fail if one does, at once; it is left when all leave it.

        Raises:
            BaseException: what was raised here, or what failed in the process of the lowest rank that did.
        """
        if self.size == 1:
            yield
            return
        with watched(self.rank, self.size) as watch:
            try:
                if watch.outermost:
                    watch.arm()
                yield
                with exchange():  # nothing can fail any more once all have come here
                    self._agree(None)
                    if watch.outermost:
                        watch.settle()
                return
            except BaseException as error:
                watch.settle()
                if is_known_to_all(error):
                    raise
                if not was_stopped(error):
                    self._tell(error, watch)
                    raise
            self._agree(None)  # raises what the process that failed gives here
            assert watch.notice is not None
            raise watch.notice.error()

    def _tell(self, error: BaseException, watch: Watch) -> None:
        """Let the others know, if they are still there; they answer at their next exchange."""
        watch.tell(error)
        try:
            self._agree(error)
        except BaseException as same:
            if same is not error and not is_known_to_all(same):
                warnings.warn(f"the other processes of torch.distributed are gone ({same})", stacklevel=3)
        known_to_all(error)

    def _agree(self, error: BaseException | None) -> None:
        """Raise what the process of the lowest rank that failed gives here; all call this together."""
        if self.size > 1:
            with exchange():
                self._compare(error)

    def _compare(self, own: BaseException | None) -> None:
        """``_agree``, as a part of an exchange."""
        errors = gathered(None if own is None else _portable(own), self.size)
        for rank, error in enumerate(errors):
            if error is not None and rank == self.rank and own is not None:
                raise known_to_all(own)
            if error is not None:
                raise known_to_all(_of_another(rank, error)) from None

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
        with exchange():
            self._compare(error)
            dist.broadcast_object_list(result, src=0)
        value: T = result[0]
        return value

    def all(self, own: T) -> list[T]:
        """What every process gives, by rank."""
        if self.size == 1:
            return [own]
        with exchange():
            self._compare(None)
            parts: list[T] = gathered(own, self.size)
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


def _of_another(rank: int, error: BaseException) -> BaseException:
    """An error of another process, with its rank; a request to stop is nobody's fault."""
    if isinstance(error, BitsMoEError):
        return type(error)(f"worker {rank} failed: {error}")
    if not isinstance(error, Exception):
        return error
    return ToldError(f"worker {rank} failed: {type(error).__name__}: {error}")


ALONE = Workers()


def _started_together() -> int:
    """How many processes torchrun has started, connected or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(what: str) -> None:
    """For what is done by one process: several would do it once each, and write over one another.

    Raises:
        ConfigError: torchrun has started several, or several are connected.
    """
    if max(Workers.present().size, _started_together()) > 1:
        raise ConfigError(f"{what} by one process; start it without torchrun")


@contextmanager
def connected() -> Iterator[Workers]:
    """The workers that torchrun has started this process as one of; on the CPU."""
    if _started_together() == 1 or dist.is_initialized():
        yield Workers.present()
        return
    dist.init_process_group("gloo")
    try:
        yield Workers.present()
    finally:
        dist.destroy_process_group()
