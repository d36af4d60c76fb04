"""How the process of another quantizer is asked by ``bitsmoe compare``, and answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bitsmoe_plugin.base.argument_types import count
from bitsmoe_plugin.base.error_lines import told
from bitsmoe_plugin.base.stdout import stdout_to_stderr


class BaselineSettings(Protocol):
    """What all quantizers have settings for."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


def baseline_parser(description: str, defaults: BaselineSettings) -> argparse.ArgumentParser:
    """A parser of the arguments that all of them take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=defaults.bits)
    parser.add_argument("--group-size", type=count(), default=defaults.group_size)
    parser.add_argument("--seed", type=count(0), default=defaults.seed)
    parser.add_argument("--trust-remote-code", action="store_true")
    text = "also other linear layers of decoder layers, but no routers"
    parser.add_argument("--all-layers", action="store_true", help=text)
    return parser


def answer(name: str, model: Path, quantize: Callable[[], dict[str, Any]]) -> int:
    """Print what ``quantize`` returns as one JSON line on stdout, or ``{"error": ...}``; all else goes to
    stderr.

    Args:
        name: of the program, for stderr.
        model: what is quantized, for errors.

    Returns:
        exit status, 1 after an error.
    """
    try:
        with stdout_to_stderr() as stdout:
            print(json.dumps(quantize()), file=stdout)
    except Exception as error:
        print(f"{name}: {error}", file=sys.stderr)
        print(json.dumps({"error": told(error, str(model))}))
        return 1
    return 0
