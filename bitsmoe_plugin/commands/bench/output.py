"""How benchmarks print: one table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TextIO

from rich.table import Table

from bitsmoe_plugin.commands.tables import table_console

Row = dict[str, Any]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_rows(rows: Sequence[Row], as_json: bool, stdout: TextIO) -> None:
    """Print rows with equal keys; a single row as a JSON object, several as a list of objects."""
    if as_json:
        print(json.dumps(rows[0] if len(rows) == 1 else list(rows), indent=2), file=stdout)
        return
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    table_console(stdout).print(table)
