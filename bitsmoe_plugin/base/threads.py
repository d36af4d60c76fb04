"""How many threads this process may keep busy: its affinity, and the quota of its control groups.

torch starts a thread for every core that it sees. Where a container may use less than that, threads wait for
each other while the kernel holds some of them back.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def affinity() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: Path = _CGROUPS, own: Path = _OWN) -> float | None:
    """Cores' worth of time that the control groups of this process leave it, None if they say nothing.

    Args:
        root: where control groups are mounted, version 2 or 1.
        own: file that names this process's.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:  # no Linux
        return None
    found = []
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        inner = top / name.lstrip("/")
        # Inside a container the name is the host's, and what is mounted is its own group.
        for folder in {top, inner, *(parent for parent in inner.parents if parent.is_relative_to(top))}:
            found.append(_limit(folder))
    return min((limit for limit in found if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    """Of one control group."""
    try:
        if (folder / "cpu.max").exists():
            given, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        elif (folder / "cpu.cfs_quota_us").exists():
            given = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        else:
            return None
    except OSError:  # not ours to read
        return None
    return None if given in ("max", "-1") else int(given) / int(period)


def usable() -> int:
    """Threads that can be busy all the time, at least 1."""
    limit = quota()
    return affinity() if limit is None else max(1, min(affinity(), math.ceil(limit)))


@contextmanager
def within_limits() -> Iterator[None]:
    """torch computes with no more threads than can be busy; afterwards with as many as before.

    Warns:
        UserWarning: it had more.
    """
    before, most = torch.get_num_threads(), usable()
    if before <= most:
        yield
        return
    warnings.warn(
        f"torch has {before} threads, but this process may use {most} (affinity or quota of its control "
        f"group); it computes with {most}",
        stacklevel=3,
    )
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)
