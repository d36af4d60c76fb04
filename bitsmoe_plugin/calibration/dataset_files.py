"""Files of text: which are read, and the rows in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitsmoe_plugin.errors import QuantizationError


def read_file(path: Path) -> tuple[list[Any], list[str]]:
    """Items of a .txt file (its text) or a .jsonl file (its objects), and where each of them stands.

    Raises:
        QuantizationError: there is no such file, or it is of another kind; not UTF-8; or naming the line that
            is no JSON object.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise QuantizationError(f"dataset file {path} {what}; give a .txt or .jsonl file")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise QuantizationError(
            f"dataset file {path}: allowed are .txt and .jsonl files, unpacked; for others, in Python, "
            "dataset=datasets.load_dataset(...)"
        )
    text = _read_text(path)
    if suffix == ".txt":
        return ([text], [str(path)]) if text.strip() else ([], [])
    return _read_lines(text, path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuantizationError(f"{path} is not UTF-8 text ({error})") from error


def _read_lines(text: str, path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QuantizationError(f"{place}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise QuantizationError(f"{place}: an object with a string 'text' is needed, or with 'messages'")
        rows.append(row)
        places.append(place)
    return rows, places
