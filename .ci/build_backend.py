"""setuptools, with distributions that are the same bytes however often and wherever they are built.

A source distribution holds what building needs, README.md and LICENSE: setuptools would add the tests, which
are of no use without their data. Times are those of SOURCE_DATE_EPOCH, or 1980.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (all hooks but those below)

_EPOCH = "315532800"
"""The earliest time that a wheel can state."""
_FILES = ("PKG-INFO", "pyproject.toml", "README.md", "LICENSE")
_FOLDERS = ("bitsmoe_plugin", "vllm_ext")


def build_wheel(wheel_directory: str, *args: Any, **options: Any) -> str:
    """As setuptools, which heeds SOURCE_DATE_EPOCH."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", _EPOCH)
    return build_meta.build_wheel(wheel_directory, *args, **options)


def build_sdist(sdist_directory: str, *args: Any, **options: Any) -> str:
    """As setuptools, less the files that are not wanted, plus this one."""
    name = build_meta.build_sdist(sdist_directory, *args, **options)
    path = Path(sdist_directory) / name
    root = name.removesuffix(".tar.gz")
    contents = {f"{root}/.ci/build_backend.py": Path(__file__).read_bytes()}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and _wanted(member.name.removeprefix(f"{root}/")):
                contents[member.name] = file.read()
    path.write_bytes(_archive(contents))
    return name


def _wanted(name: str) -> bool:
    return name in _FILES or name.partition("/")[0] in _FOLDERS


def _archive(contents: dict[str, bytes]) -> bytes:
    """A .tar.gz of files by name, with nothing in it of the machine or the moment."""
    made = int(os.environ.get("SOURCE_DATE_EPOCH", _EPOCH))
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=made) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, content in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(content), made, 0o644
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
