"""Memory that is free, but not given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


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
