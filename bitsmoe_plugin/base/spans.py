"""Where the time goes: parts of the work, timed where they are done while somebody records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class _Recorder:
    """Adds seconds to a table; those of a part inside another are the inner one's alone."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds, self._device = seconds, device
        self._open: list[str] = []
        self._since = self._now()

    def _now(self) -> float:
        """When all that a GPU was asked for is done: it would be computed in the time of another part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _settle(self) -> None:
        """What has passed belongs to the innermost part."""
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        self._settle()
        self._open.append(name)

    def leave(self) -> None:
        self._settle()
        self._open.pop()


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """A part of the work, as a context or a decorator. Costs next to nothing while nobody records."""
    recorder = _RECORDER.get()
    if recorder is None:
        yield
        return
    recorder.enter(name)
    try:
        yield
    finally:
        recorder.leave()


@contextmanager
def recorded(seconds: dict[str, float], device: torch.device | str = "cpu") -> Iterator[None]:
    """Add the seconds of each part that is done inside to ``seconds``; what is in no part is left out.

    Inside another ``recorded``, this one alone sees the parts until it ends; then the other gets all that is
    in ``seconds``, what was in there before included.
    """
    outer, inner = _RECORDER.get(), _Recorder(seconds, torch.device(device))
    if outer is not None:
        outer.enter("")
    token = _RECORDER.set(inner)
    try:
        yield
    finally:
        _RECORDER.reset(token)
        if outer is not None:
            outer.leave()
            outer.seconds.pop("", None)
            for name, value in seconds.items():
                outer.seconds[name] = outer.seconds.get(name, 0.0) + value
