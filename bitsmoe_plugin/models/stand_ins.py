"""Names that stand for others, so that transformers does not rename them on saving."""

from __future__ import annotations

_START, _DOT = "bitsmoe_carried_", "//"


def stand_in(name: str) -> str:
    """Another name for a tensor, in which no rule of transformers finds a part to rename.

    Such rules are regular expressions with dots in them, which match any one character.
    """
    return _START + name.replace(".", _DOT)


def is_stand_in(name: str) -> bool:
    """Whether ``stand_in`` made a name."""
    return name.startswith(_START)


def stood_for(name: str) -> str:
    """The name that a name of ``stand_in`` stands for; another name itself."""
    return name.removeprefix(_START).replace(_DOT, ".") if is_stand_in(name) else name
