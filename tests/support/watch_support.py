"""A program for three processes: one fails while the others would compute for ten minutes, in several ways.

Arguments: rank, a file that no other run uses, "fail", "killed" or "first killed". Prints what the processes
end with, one line per way.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from bitsmoe_plugin.base.worker_errors import Stopped
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.errors import ConfigError

TEN_MINUTES = 600


def in_torch() -> None:
    end = time.monotonic() + TEN_MINUTES
    while time.monotonic() < end:
        torch.ones(100, 100) @ torch.ones(100, 100)


def in_c() -> None:
    """A call that Python cannot interrupt takes a second."""
    library = ctypes.CDLL(None)
    for _ in range(TEN_MINUTES):
        library.usleep(999_999)


def in_sleep() -> None:
    time.sleep(TEN_MINUTES)


def where_exceptions_get_lost() -> None:
    """The first signals come while ``__del__`` runs, which swallows what is raised in it."""

    class Lost:
        def __del__(self) -> None:
            time.sleep(1)

    sys.unraisablehook = lambda _: None
    Lost()
    in_sleep()


def while_it_cleans_up() -> None:
    """What is cleaned up is not interrupted."""
    try:
        in_sleep()
    finally:
        time.sleep(1)
        print(f"{sys.argv[1]} cleaned up", flush=True)


def and_raises_another() -> None:
    try:
        in_sleep()
    except Stopped:
        raise OSError("on the way out") from None


def fail(kind: type[Exception]) -> None:
    time.sleep(0.5)
    raise kind("the disk burns")


def attempt(
    workers: Workers, work: Callable[[], None], name: str, kind: type[Exception] = ValueError
) -> None:
    """Worker 1 fails, worker 0 works."""
    try:
        with workers.together(), workers.together():
            if workers.rank == 1:
                fail(kind)
            work()
        print(workers.rank, name, "finished", flush=True)
    except Exception as error:
        print(workers.rank, name, f"{type(error).__name__}: {error}", flush=True)


def in_a_thread(workers: Workers) -> None:
    """No signal reaches it; it is told at the next exchange."""

    def work() -> None:
        time.sleep(1)
        workers.all(1)
        in_sleep()

    thread = threading.Thread(target=attempt, args=(workers, work, "thread"))
    thread.start()
    thread.join()


def end_well(workers: Workers) -> None:
    """Nothing is left of the watch, and signals go where they went."""
    with workers.together():
        assert workers.all(workers.rank) == [0, 1, 2]
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL
    assert threading.active_count() == 1
    print(workers.rank, "end well", flush=True)


def killed(workers: Workers, rank: int, work: Callable[[], object]) -> None:
    try:
        with workers.together():
            if workers.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            work()
    except Exception as error:
        print(workers.rank, "killed", f"{type(error).__name__}: {error}", flush=True)


def main() -> None:
    rank, where, what = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=3)
    workers = Workers.present()
    if what == "killed":
        killed(workers, 1, in_torch)
    elif what == "first killed":
        killed(workers, 0, lambda: workers.all(rank))
    else:
        for work in (in_torch, in_c, in_sleep, where_exceptions_get_lost, while_it_cleans_up):
            attempt(workers, work, work.__name__)
        attempt(workers, and_raises_another, "another")
        attempt(workers, in_sleep, "our own", ConfigError)
        in_a_thread(workers)
        end_well(workers)
        dist.destroy_process_group()  # left to the end of Python, its threads can abort the process


if __name__ == "__main__":
    main()
