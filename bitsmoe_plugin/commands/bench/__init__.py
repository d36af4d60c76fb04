"""Benchmarks: ``bitsmoe bench NAME``. Each module here defines one.

A module has ``add(commands)``, which adds its parser, and a function from the parsed options to a list of
rows (flat dicts), one per line of its table. Everything is measured side by side in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitsmoe_plugin.commands.bench import allocation, checkpoint, decode, layer, quantize

BENCHMARKS: tuple[Callable[[Any], None], ...] = (
    layer.add,
    decode.add,
    quantize.add,
    allocation.add,
    checkpoint.add,
)
