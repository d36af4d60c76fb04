"""A table of options, written as attributes of a class: constructor, checks and documents follow from it."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, Signature
from typing import Any

from bitsmoe_plugin.base.option_checks import Check


@dataclass(frozen=True, kw_only=True)
class Option:
    """One row.

    Args:
        help: what it is, for the command line and for documents; one clause.
        more: further sentences, for documents.
        check: what is allowed; None: anything.
        default: if it is not given.
        by_method: instead of ``default``, and of None: {method: what it sets the option to}, the default
            method first.
        flag: what stands for the value of its flag on the command line; "" if it has none.
        stored: in checkpoints "always", "if filled" or "if changed" (from the default; older releases can
            read those where it is not), or "never".
        shared: the object that was given is what is kept, and copies have the same.
        manifest: written by this package, not for users.
        convert: what is kept, of what was given.
        annotation: type of the attribute.
    """

    help: str
    more: str = ""
    check: Check | None = None
    default: Any = None
    by_method: Mapping[str, Any] | None = None
    flag: str = ""
    stored: str = "always"
    shared: bool = False
    manifest: bool = False
    convert: Callable[[Any], Any] = lambda value: value
    annotation: str = ""

    def taken(self, given: Any, method: str) -> Any:
        """What becomes of the value that was given, or of the default."""
        value = self.by_method[method] if given is None and self.by_method is not None else given
        value = self.convert(value)
        return value if self.shared else copy.deepcopy(value)

    def refuse(self, name: str, value: Any) -> None:
        """Raises ConfigError, naming the option, if ``value`` is not allowed."""
        if self.check is not None:
            self.check(name, value)

    def is_stored(self, value: Any) -> bool:
        """Whether checkpoints have the option where it has ``value``."""
        if self.stored == "if changed":
            return bool(value != self.default)
        return self.stored == "always" or (self.stored == "if filled" and bool(value))


def option(help: str, more: str = "", **row: Any) -> Any:
    """A row of the table; for type checkers a value of the attribute's type."""
    return Option(help=help, more=more, **row)


def rows_of(table: type) -> dict[str, Option]:
    """The options of a class, by name, in its order; the attributes themselves are of instances alone."""
    types = table.__annotations__
    rows = {n: replace(row, annotation=types[n]) for n, row in vars(table).items() if isinstance(row, Option)}
    for name in rows:
        delattr(table, name)
    return rows


def signature_of(rows: Mapping[str, Option]) -> Signature:
    """Of a constructor that takes ``rows``, by name or in their order, and collects ``unknown`` ones."""
    kind, parameters = Parameter.POSITIONAL_OR_KEYWORD, []
    for name, row in rows.items():
        optional = row.default is None and row.annotation != "Any" and "None" not in row.annotation
        annotation = f"{row.annotation} | None" if optional else row.annotation
        parameters.append(Parameter(name, kind, default=row.default, annotation=annotation))
    unknown = Parameter("unknown", Parameter.VAR_KEYWORD, annotation="Any")
    return Signature([Parameter("self", kind), *parameters, unknown], return_annotation="None")


def described(rows: Mapping[str, Option]) -> str:
    """The section ``Args`` of a docstring: help, what is allowed, and what each method sets."""
    return "\n".join(["    Args:", *(_described(name, row) for name, row in rows.items())])


def _described(name: str, row: Option) -> str:
    sentences = [f"{name}: {row.help}.", row.more]
    if row.check is not None and not row.manifest and row.annotation != "bool":
        sentences.append(f"Allowed: {row.check.allowed}.")
    default = row.default
    if row.by_method is not None:
        default = next(iter(row.by_method.values()))
    if default is not None:
        sentences.append(f"Default: {default!r}.")
    others = [f"{method} {value!r}" for method, value in (row.by_method or {}).items() if value != default]
    if others:
        sentences.append(f"By method: {', '.join(others)}.")
    text = " ".join(sentence for sentence in sentences if sentence)
    return textwrap.fill(
        text, 106, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
    )
