"""Ctrl-C while work is saved piece by piece: once stops after the piece, twice at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bitsmoe_plugin.base.work_directory import has_progress, locked, staging


class Interrupted(KeyboardInterrupt):
    """Stopped on request where nothing is lost; says how to go on."""


@contextmanager
def deferred_interrupt(piece: str = "layer") -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function return True; the second acts as usual.

    Has no effect outside the main thread, or where the program handles Ctrl-C in its own way.

    Args:
        piece: of the work, after which it is saved; for the message.
    """
    requested = False
    usual = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, usual)
        print(f"\nstopping when this {piece} is finished; Ctrl-C again stops at once", file=sys.stderr)

    ours = threading.current_thread() is threading.main_thread() and usual is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: requested
    finally:
        if ours:
            signal.signal(signal.SIGINT, usual)


@contextmanager
def kept_unless_finished(work: Path) -> Iterator[None]:
    """Hold a work directory; if this ends early, what is finished stays, and Ctrl-C says how to go on.

    Raises:
        QuantizationError: see ``work_directory.locked``.
        Interrupted: instead of KeyboardInterrupt, where something is finished.
    """
    with locked(work), staging(work):
        try:
            yield
        except KeyboardInterrupt as error:
            if has_progress(work) and not isinstance(error, Interrupted):
                raise Interrupted(
                    f"stopped; {work} holds what is finished. Start the same again to go on"
                ) from error
            raise
