"""Directories and files that are either absent or complete: written elsewhere, renamed when done."""

from __future__ import annotations

import os
from pathlib import Path

from bitsmoe_plugin.base.work_directory import sync_directory, sync_tree
from bitsmoe_plugin.errors import QuantizationError


def check_output_directory(out: Path) -> None:
    """Raises QuantizationError unless ``out`` is absent or an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizationError(
            f"output directory {out} exists and is not empty; choose another or remove it"
        )


def publish(partial: Path, out: Path) -> None:
    """Give a finished directory the name ``out``, which ``check_output_directory`` accepts, durably."""
    sync_tree(partial)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    sync_directory(out.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it is seen."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
