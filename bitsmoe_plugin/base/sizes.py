"""Sizes in words."""

from __future__ import annotations

import math


def readable_size(size: int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1."""
    unit = min(3, int(math.log10(max(size, 1)) // 3))
    return f"{size / 1000**unit:.{3 if unit else 0}f} {('B', 'kB', 'MB', 'GB')[unit]}"
