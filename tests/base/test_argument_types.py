"""Counts and numbers of the command line: what is none is refused by the parser, before anything is done."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from bitsmoe_plugin.base.argument_types import count, counts, positive, positives
from bitsmoe_plugin.cli import build_parser
from bitsmoe_plugin.options import OPTIONS
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (count(), "1", 1),
        (count(0), "0", 0),
        (counts, "8,1", [8, 1]),
        (positive, "2.5", 2.5),
        (positives, "2,3.5", [2.0, 3.5]),
    ],
)
def test_values(kind: Any, text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((count(), text) for text in ("0", "-1", "1.5", "many", "")),
        (count(0), "-1"),
        *((counts, text) for text in ("", "1,", "0", "4,-4", "1.5,2")),
        *((positive, text) for text in ("0", "-2", "nan", "inf", "two")),
        *((positives, text) for text in ("", "2,0", "2;3", "nan,2")),
    ],
)
def test_what_is_no_such_value(kind: Any, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no "):
        kind(text)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_no_option_takes_any_whole_number() -> None:
    """Zero and negative counts ran, and measured nothing. BitsMoEConfig and TuningSettings check,
    and name, what is theirs."""
    theirs = {*OPTIONS, *(field.name for field in fields(TuningSettings))}
    for parser in parsers(build_parser()):
        for action in parser._actions:
            assert action.dest in theirs or action.type not in (int, float), (parser.prog, action.dest)
