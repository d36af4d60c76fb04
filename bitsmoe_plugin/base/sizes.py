"""Sizes in words, and as users write them: "11GB", "24 GiB", or a number of bytes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OFFSET = 10**10
"""Files that transformers writes are not larger than 50 GB."""


def size_in_bytes(value: Any) -> int | None:
    """Bytes of ``value``; None if it is no size. GB are 1e9 bytes, GiB 2**30."""
    if type(value) is int:
        return value if 0 < value < 2**63 else None
    text = value if type(value) is str else ""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        return None
    size = int(float(match[1]) * unit)
    return size if 0 < size < 2**63 else None


def size_text(size: int) -> str:
    """In GB, MB or kB, such that at least 1 is left; rounded up in the last place."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{-(-size * 1000 // unit) / 1000:.3f} {name}"
    return f"{size} B"


def readable_size(size: int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1."""
    unit = min(3, int(math.log10(max(size, 1)) // 3))
    return f"{size / 1000**unit:.{3 if unit else 0}f} {('B', 'kB', 'MB', 'GB')[unit]}"


def header_bytes(name: str, shape: Sequence[int]) -> int:
    """What a tensor takes in the header of a safetensors file, at most."""
    told = {"dtype": "BF16", "shape": list(shape), "data_offsets": [_OFFSET, _OFFSET]}
    return len(json.dumps({name: told}, separators=(",", ":"))) - 1
