"""Where the time of a quantization went: kept beside the packed model, told by command line and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.atomic_output import replace_file

FILE = "quantization_time.json"
"""Not in config.json, of which the same run makes the same bytes."""


def write_times(directory: Path, seconds: dict[str, float]) -> None:
    """Keep the seconds of each part beside a packed model."""
    content = {"seconds": {part: round(value, 3) for part, value in longest_first(seconds).items()}}
    replace_file(directory / FILE, json.dumps(content, indent=2).encode())


def read_times(directory: Path) -> dict[str, float]:
    """Seconds by part, the longest first; none where they were not kept, or the file is something else."""
    try:
        found: Any = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    seconds = found.get("seconds") if isinstance(found, dict) else None
    if not isinstance(seconds, dict):
        return {}
    kept = {str(part): value for part, value in seconds.items() if type(value) in (int, float)}
    return longest_first({part: float(value) for part, value in kept.items() if 0 <= value < 1e12})


def longest_first(seconds: dict[str, float]) -> dict[str, float]:
    """The same parts in falling order."""
    return dict(sorted(seconds.items(), key=lambda part: -part[1]))


def told_times(seconds: dict[str, float]) -> str:
    """One line: the total, and the parts of at least a hundredth of it."""
    total = sum(seconds.values())
    parts = [
        f"{part} {100 * value / total:.0f} %"
        for part, value in longest_first(seconds).items()
        if total and value >= total / 100
    ]
    return f"where {total:.0f} s went: {', '.join(parts)}"
