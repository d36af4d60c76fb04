"""Types of arguments of the command line: what is no such value is refused before anything is done."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def count(least: int = 1) -> Callable[[str], int]:
    """Whole numbers of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return value

    return parse


def counts(text: str) -> list[int]:
    """A comma list of whole numbers of at least 1, in its order.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        return [count()(part) for part in text.split(",")]
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{text!r} is no comma list of whole numbers of at least 1") from error


def positive(text: str) -> float:
    """A finite number above 0.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def positives(text: str) -> list[float]:
    """A comma list of finite numbers above 0, in its order.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        return [positive(part) for part in text.split(",")]
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{text!r} is no comma list of numbers above 0") from error
