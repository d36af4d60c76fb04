"""Values of a manifest that nothing else relies on: written by others, so taken only if they make sense.

An older or converted checkpoint lacks some of them, and one that was tampered with may hold anything. Readers
leave out what they cannot use; what sizes and hashes protect is checked where the checkpoint is read.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np


def measured(entry: dict[str, Any]) -> dict[str, Any]:
    """What was measured while a layer was quantized; empty if its entry in the manifest does not tell."""
    told = entry.get("report")
    return told if isinstance(told, dict) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    # Beyond this nothing is meant, and neither floats nor axes of a plot take all that JSON can hold.
    return type(value) in (int, float) and -1e30 < value < 1e30


def number(values: dict[str, Any], key: str) -> float | None:
    """A number, or None."""
    value = values.get(key)
    return float(value) if _is_number(value) else None


def number_list(values: dict[str, Any], key: str, length: int) -> np.ndarray | None:
    """``[length]`` float64 of such numbers, or None."""
    value = values.get(key)
    if not isinstance(value, list) or len(value) != length or not all(map(_is_number, value)):
        return None
    return np.array(value, dtype=np.float64)


def number_table(values: dict[str, Any], key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """``shape`` float64 of such numbers, or None."""
    value = values.get(key)
    if not isinstance(value, list) or len(value) != shape[0]:
        return None
    rows = [number_list({key: row}, key, shape[1]) for row in value]
    return None if any(row is None for row in rows) else np.stack([row for row in rows if row is not None])


def id_list(values: dict[str, Any], key: str, below: int) -> tuple[int, ...]:
    """Ids below a number; none if anything else is in the list."""
    value = values.get(key)
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < below for i in value):
        return ()
    return tuple(value)
