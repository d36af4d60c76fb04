"""What decoder layers return beside hidden states, for later ones (indices of a sparse attention, states of a
router): marks stand for it while a model is recorded, and tell which layers it is given to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Returned:
    """Stands for a value, in the arguments of layers that are given it.

    Attributes:
        layer: that returns it.
        position: in what that returns; 0 are hidden states.
    """

    layer: int
    position: int

    @property
    def key(self) -> str:
        """Its name among all that is left for later layers."""
        return f"returned/{self.layer}/{self.position}"


def marks_in(value: Any) -> Iterator[Returned]:
    """All marks in arguments, in their order."""
    if isinstance(value, Returned):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from marks_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from marks_in(item)


def replaced(value: Any, values: Callable[[Returned], Any]) -> Any:
    """Arguments with values in the place of marks; what holds none is the same object."""
    if isinstance(value, Returned):
        return values(value)
    if next(marks_in(value), None) is None:
        return value
    if isinstance(value, dict):
        return {key: replaced(item, values) for key, item in value.items()}
    return type(value)(replaced(item, values) for item in value)


def wanted_after(arguments: Sequence[Any]) -> list[frozenset[Returned]]:
    """Of each layer, what layers after it are given of the values that it and those before it return.

    Args:
        arguments: of each layer.
    """
    later: frozenset[Returned] = frozenset()
    found = []
    for index in range(len(arguments) - 1, -1, -1):
        found.append(frozenset(mark for mark in later if mark.layer <= index))
        later |= frozenset(marks_in(arguments[index]))
    return found[::-1]
