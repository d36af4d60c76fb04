"""What tables of several commands share."""

from __future__ import annotations

import re
from typing import TextIO

from rich.console import Console


def table_console(stream: TextIO) -> Console:
    """A console for tables: as wide as the terminal, or 160 columns in a file or pipe."""
    return Console(file=stream, width=None if stream.isatty() else 160)


def layer_label(name: str, position: int) -> str:
    """Number of the decoder layer, or the position among the MoE layers if its name has none."""
    numbered = re.search(r"\.(\d+)\.", name)
    return numbered[1] if numbered else str(position)
