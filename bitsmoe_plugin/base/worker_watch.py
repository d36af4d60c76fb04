"""Ends a process in the middle of its work when another one that shares the work fails or dies.

A thread listens on ``worker_links``. When it hears of a failure, it sends the main thread a signal, whose
handler raises ``Stopped`` wherever that thread is, or as soon as it returns to Python. But not within an
exchange, for which the others are needed as well, and not while an exception is handled: what is cleaned up
then shall be clean. In other threads, errors are met at the next exchange.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from bitsmoe_plugin.base.worker_errors import Notice, Stopped, is_known_to_all
from bitsmoe_plugin.base.worker_links import connect

_SIGNAL: Any = getattr(signal, "SIGURG", None)
"""Ignored by whoever does not wait for it, unlike those that users send; not on Windows."""
_AGAIN = 0.5
"""Seconds between signals, until one was not ignored."""
_PATIENCE = 5.0
"""Seconds to learn who is gone, after an exchange has failed."""
_LONGEST = 2000
_FAILED, _GONE, _DONE = "failed", "gone", "done"


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int
    link: socket.socket
    heard: bytes = b""
    done: bool = False


class Watch:
    """Of one process over the others.

    Attributes:
        notice: what is known of another process that failed; None while all is well.
    """

    def __init__(self, rank: int, links: dict[int, socket.socket]) -> None:
        """
        Args:
            rank: of this process.
            links: see ``worker_links.connect``.
        """
        self.notice: Notice | None = None
        self._rank = rank
        self._peers = [_Peer(*peer) for peer in links.items()]
        self._known = threading.Event()
        self._sending = threading.Lock()
        self._armed = False
        self._depth = self._exchanges = 0
        self._handled: BaseException | None = None

    def arm(self) -> None:
        """From now on, ``Stopped`` is caught."""
        self._armed = True

    def settle(self) -> None:
        """Do not interrupt any more: this process ends, or all have finished."""
        self._armed = False

    def tell(self, error: BaseException) -> None:
        """Let the others know at once that this process fails."""
        text = f"{type(error).__name__}: {error}"
        self._send(_FAILED, self._rank, text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")

    @property
    def outermost(self) -> bool:
        """Whether nothing else is left of what was begun together."""
        return self._depth == 1

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, exceptions that were being handled before do not keep this process from being stopped."""
        before, self._handled = self._handled, sys.exc_info()[1]
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._handled = before

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Inside, all processes exchange something, and this one is not interrupted.

        Raises:
            QuantizationError: a process is gone.
        """
        if self.notice is not None and self.notice.text is None:
            raise self.notice.error() from None
        self._exchanges += 1
        try:
            yield
        except RuntimeError as error:  # of torch.distributed, where a connection is lost
            lost = bool(self._peers) and not is_known_to_all(error) and self._known.wait(_PATIENCE)
            if not lost or self.notice is None:
                raise
            raise self.notice.error() from error
        finally:
            self._exchanges -= 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the main thread is interrupted, if it is the one that calls this."""
        wake, woken = socket.socketpair()
        usual = None if _SIGNAL is None else signal.getsignal(_SIGNAL)
        main = threading.current_thread() is threading.main_thread() and usual is not None
        thread = threading.Thread(target=self._listen, args=(woken, main), daemon=True)
        if main:
            signal.signal(_SIGNAL, self._on_signal)
        thread.start()
        try:
            yield
        finally:
            self.settle()
            wake.close()
            thread.join()
            if main:
                signal.signal(_SIGNAL, usual)
            self._send(_DONE, self._rank, None)
            for link in (woken, *(peer.link for peer in self._peers)):
                link.close()

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        cleans_up = sys.exc_info()[1] is not self._handled
        if self.notice is not None and self._armed and not self._exchanges and not cleans_up:
            raise Stopped(str(self.notice.error()))

    def _listen(self, woken: socket.socket, main: bool) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(woken, selectors.EVENT_READ)
            for peer in self._peers:
                selector.register(peer.link, selectors.EVENT_READ, peer)
            while True:
                for key, _ in selector.select(_AGAIN if self.notice else None):
                    if key.data is None:
                        return
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                if main and self.notice and self._armed:
                    signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)

    def _hear(self, peer: _Peer) -> bool:
        """Take in what a peer says; whether it may say more."""
        try:
            part = peer.link.recv(4096)
        except OSError:  # its system says that it is gone, or does not answer
            part = b""
        if not part:
            if not peer.done:
                self._note(Notice(peer.rank, None))
            return False
        *lines, peer.heard = (peer.heard + part).split(b"\n")
        for kind, rank, text in map(json.loads, lines):
            peer.done = peer.done or kind == _DONE
            if kind != _DONE:
                self._note(Notice(rank, text))
        return True

    def _note(self, notice: Notice) -> None:
        """Remember the first, and let others know: the first process alone is connected to all."""
        if self.notice is None and notice.rank != self._rank:
            self.notice = notice
            self._known.set()
            self._send(_FAILED if notice.text is not None else _GONE, notice.rank, notice.text)

    def _send(self, kind: str, rank: int, text: str | None) -> None:
        line = json.dumps([kind, rank, text]).encode("ascii") + b"\n"
        with self._sending:
            for peer in self._peers:
                with suppress(OSError):  # it is gone itself, which is noticed where it is listened to
                    peer.link.sendall(line)


_watch: Watch | None = None
"""Of the outermost ``watched``: a process is part of one group."""


@contextmanager
def watched(rank: int, size: int) -> Iterator[Watch]:
    """Inside, this process watches the others, and they this one. All enter and leave this together."""
    global _watch
    if _watch is not None:
        with _watch.entered():
            yield _watch
        return
    watch = Watch(rank, connect(rank, size))
    try:
        with watch.entered(), watch.listening():
            _watch = watch
            yield watch
    finally:
        _watch = None


@contextmanager
def exchange() -> Iterator[None]:
    """``Watch.exchange`` where others are watched."""
    if _watch is None:
        yield
        return
    with _watch.exchange():
        yield
