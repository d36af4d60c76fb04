"""JSON that others wrote: of bounded size and depth, and without keys that stand twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitsmoe_plugin.errors import CheckpointError

_LARGEST = 2**28
_LONGEST_NAME = 512


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:_LONGEST_NAME]!r} stands in it twice")
    return found


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``text``.

    Args:
        what: it is, for errors.

    Raises:
        CheckpointError: no JSON object, nested too deep, or with a key that stands twice.
    """
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read ({error}); download or make it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{what} cannot be read (it holds a {type(values).__name__}, not an object)")
    return values


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is no such file, it is of absurd size, or see ``parse_object``.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} cannot be read (no such file); is {path.parent} a checkpoint?")
        size = path.stat().st_size
        if size > _LARGEST:
            raise CheckpointError(f"{path} has {size} bytes; more than {_LARGEST} are not read")
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else _unreadable(path, error) from error
    return parse_object(text, str(path))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}); is {path.parent} a checkpoint?")
