"""Several budgets in one text: ``1.2:4:0.2`` is 1.2, 1.4, ..., 4."""

from __future__ import annotations

from argparse import ArgumentTypeError
from decimal import Decimal, InvalidOperation

MOST = 200
"""Budgets in a range: more is a slip of the keyboard."""


def budgets(text: str) -> float | tuple[float, ...]:
    """The budget that a text names, or all of a range FIRST:LAST:STEP, both ends included.

    Steps are decimal, so 1.2 + 4 * 0.2 is 2.0 to the last bit.

    Raises:
        ArgumentTypeError: neither of both, or a range that is empty or does not end.
    """
    try:
        parts = [Decimal(part) for part in text.split(":")]
    except InvalidOperation as error:
        raise ArgumentTypeError(f"{text!r} is neither a number nor FIRST:LAST:STEP, as 1.2:4:0.2") from error
    if not all(part.is_finite() for part in parts) or len(parts) not in (1, 3):
        raise ArgumentTypeError(f"{text!r} is neither a number nor FIRST:LAST:STEP, as 1.2:4:0.2")
    if len(parts) == 1:
        return float(parts[0])
    first, last, step = parts
    if not (0 < first <= last and step > 0):
        raise ArgumentTypeError(f"{text!r}: FIRST:LAST:STEP wants 0 < FIRST <= LAST and STEP above 0")
    count = int((last - first) / step) + 1
    if count > MOST:
        raise ArgumentTypeError(f"{text!r} has {count} budgets; at most {MOST}: take a larger STEP")
    return tuple(float(first + place * step) for place in range(count))
