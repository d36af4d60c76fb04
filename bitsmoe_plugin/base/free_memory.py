"""Memory that is free: how much, and what is not given back to the system."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
    return trim


def release_free_memory() -> None:
    """Give pages back that glibc keeps between blocks that are in use, a gigabyte after a large layer."""
    trim = _trim()
    if trim is not None:
        trim(0)


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process can still take on a device; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo") or "")
    if found is None:
        return None
    return max(0, min([1024 * int(found[1]), *_left_to_group()]))


def _left_to_group() -> list[int]:
    """Bytes that control groups (containers, batch systems) still allow, if they limit any."""
    left = []
    for limit, used, pages in _GROUPS:
        numbers = [_text(limit), _text(used)]
        if all(number is not None and number.strip().isdigit() for number in numbers):
            most, now = (int(number or 0) for number in numbers)
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(pages) or "", re.MULTILINE)
            left.append(most - now + int(cached[1] if cached else 0))
    return left


_V2, _V1 = "/sys/fs/cgroup/memory.", "/sys/fs/cgroup/memory/memory."
_GROUPS = (
    (f"{_V2}max", f"{_V2}current", f"{_V2}stat"),
    (f"{_V1}limit_in_bytes", f"{_V1}usage_in_bytes", f"{_V1}stat"),
)


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return None
