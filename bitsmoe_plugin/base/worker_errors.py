"""What is raised in a process when another one that shares the work fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from bitsmoe_plugin.errors import QuantizationError

T = TypeVar("T", bound=BaseException)
_KNOWN = "_known_to_all_workers"
"""Attribute of errors that every process raises."""


class Stopped(BaseException):
    """Raised in the middle of work, because another process has failed."""


def known_to_all(error: T) -> T:
    """The error, marked as one that every process raises, so that none has to tell it."""
    setattr(error, _KNOWN, True)
    return error


def is_known_to_all(error: BaseException) -> bool:
    """Whether ``known_to_all`` marked it."""
    return getattr(error, _KNOWN, False)


@dataclass(frozen=True)
class Notice:
    """What is known of the first process that failed.

    Attributes:
        rank: its.
        text: of its error; None if it has ended without a word.
    """

    rank: int
    text: str | None

    def error(self) -> QuantizationError:
        """For the other processes."""
        text = f"worker {self.rank} failed: {self.text}"
        if self.text is None:
            text = f"worker {self.rank} ended without a word: it was killed, or its machine is gone"
        return known_to_all(QuantizationError(text))


def was_stopped(error: BaseException | None) -> bool:
    """Whether ``Stopped`` was raised, whatever was raised on the way out."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error is not None
