"""Checks of single options: one error that names the option, its value and what is allowed."""

from __future__ import annotations

import reprlib
from typing import Any

from bitsmoe_plugin.errors import ConfigError


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
    kinds = (int,) if whole else (int, float)
    what = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        fail(option, value, f"{what} from {low:g} to {high:g}", owner)


def check_choice(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Fail unless ``value`` is one of ``choices``, which are of one type."""
    if value not in choices or type(value) is not type(choices[0]):
        fail(option, value, ", ".join(repr(choice) for choice in choices))


def check_template_kwargs(value: Any) -> None:
    """Fail unless ``value`` is None or arguments that a user may choose for a chat template."""
    ours = ("conversation", "tools", "tokenize", "padding", "truncation", "max_length", "return_tensors")
    taken = (*ours, "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs")
    if value is None or (isinstance(value, dict) and all(type(k) is str and k not in taken for k in value)):
        return
    fail("chat_template_kwargs", value, f"an object of arguments by name, without {', '.join(taken)}")


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
