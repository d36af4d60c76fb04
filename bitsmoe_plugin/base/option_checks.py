"""Checks of single options: one error that names the option, its value and what is allowed."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bitsmoe_plugin.errors import ConfigError

NOT_FOR_TEMPLATES = (
    "conversation",
    "tools",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
"""Arguments of chat templates that are ours to set."""


def _brief(value: Any) -> str:
    """For errors: a config of others may hold values of any length and depth."""
    text = reprlib.repr(value) if isinstance(value, (list, dict)) else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def fail(option: str, value: Any, allowed: str, owner: str = "BitsMoEConfig") -> None:
    """Raise a ConfigError that names the option, what has it, its value and what is allowed."""
    raise ConfigError(f"{owner}: {option}={_brief(value)} is not allowed; allowed: {allowed}")


def check_number(
    option: str, value: Any, low: float, high: float, whole: bool = False, owner: str = "BitsMoEConfig"
) -> None:
    """Fail unless ``value`` is a number (no bool) from ``low`` to ``high``."""
    allowed = number(low, high, whole)
    if not allowed.accepts(value):
        fail(option, value, allowed.allowed, owner)


def check_choice(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Fail unless ``value`` is one of ``choices``, which are of one type."""
    one_of(*choices)(option, value)


def is_budget_table(value: Any) -> bool:
    """Whether ``value`` maps names to bits that a budget can have."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and type(bits) in (int, float) and 0.1 <= bits <= 16
        for name, bits in value.items()
    )


def is_expert_table(value: Any) -> bool:
    """Whether ``value`` maps paths of experts to lists of expert ids."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        for name, ids in value.items()
    )


def is_template_kwargs(value: Any) -> bool:
    """Whether ``value`` is arguments that a user may choose for a chat template."""
    return isinstance(value, dict) and all(type(k) is str and k not in NOT_FOR_TEMPLATES for k in value)


@dataclass(frozen=True)
class Check:
    """What an option may be.

    Args:
        allowed: in words, for errors and documents.
        accepts: whether a value is allowed.
        tell_type: errors name the value's type, because the value is too long to print.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    tell_type: bool = False

    def __call__(self, option: str, value: Any) -> None:
        """Raises ConfigError, naming ``option``, unless ``value`` is allowed."""
        if not self.accepts(value):
            fail(option, type(value).__name__ if self.tell_type else value, self.allowed)

    def or_none(self) -> Check:
        """None is allowed too."""
        return Check(self.allowed, lambda value: value is None or self.accepts(value), self.tell_type)


def number(low: float, high: float, whole: bool = False) -> Check:
    """A number (no bool) from ``low`` to ``high``."""
    kinds = (int,) if whole else (int, float)
    what = "a whole number" if whole else "a number"
    return Check(
        f"{what} from {low:g} to {high:g}",
        lambda value: not isinstance(value, bool) and isinstance(value, kinds) and low <= value <= high,
    )


def one_of(*choices: Any) -> Check:
    """One of ``choices``, which are of one type."""
    return Check(
        ", ".join(repr(choice) for choice in choices),
        lambda value: type(value) is type(choices[0]) and value in choices,
    )
