"""Errors as commands tell them: one line that names what was worked on."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitsmoe_plugin.errors import BitsMoEError

_SUBJECT = "bitsmoe_subject"
_LONGEST = 600
_OURS = Path(__file__).parents[1]  # of all rooms
_OF_PROGRAMS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    NotImplementedError,
    TypeError,
    ZeroDivisionError,
)
"""Types that no input should lead to in code of ours."""


class ToldError(RuntimeError):
    """An error of another process, which has told it in one line."""


@contextmanager
def working_on(subject: str) -> Iterator[None]:
    """Errors of other libraries that are raised inside are told as those of ``subject``.

    The innermost subject counts. Errors of ours name theirs themselves. Nothing else changes for whoever
    catches them.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, BitsMoEError) and not hasattr(error, _SUBJECT):
            setattr(error, _SUBJECT, subject)
        raise


def one_line(error: BaseException) -> str:
    """The message with lines joined, and cut where it is very long."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def told(error: BaseException, command: str) -> str:
    """What is said of an error.

    Args:
        command: what was asked for, named where nothing more precise is known.
    """
    if isinstance(error, ToldError):
        return str(error)
    if isinstance(error, BitsMoEError):
        return " ".join(str(error).split())
    parts = [str(getattr(error, _SUBJECT, command)), type(error).__name__, one_line(error)]
    line = ": ".join(part for part in parts if part)
    if isinstance(error, _OF_PROGRAMS) and _raised_by_us(error):
        return f"{line}. This is a fault of bitsmoe-plugin; please report it with what --debug prints"
    return f"{line} (--debug shows where)"


def _raised_by_us(error: BaseException) -> bool:
    """Whether the innermost code is of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_OURS)
