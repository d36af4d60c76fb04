"""Results of classes that a folder keeps, as long as they are true.

What a result follows from is its key: versions of Python and of packages, the source of this project that
computes, the small config of the class, and for vLLM what transformers' side follows from too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from isolated import ROOT
from model_classes import ModelClass
from recipes import BFLOAT16, TOKENIZED, UNBIASED
from small_models import small_config

_HERE = Path(__file__).parent
_MODULES = ("steps", "small_models", "published")
_SOURCES = {
    "transformers": [ROOT / "bitsmoe_plugin", *(_HERE / f"{name}.py" for name in _MODULES)],
    "vllm": [ROOT / "vllm_ext", _HERE / "serving.py"],
}
_NO_PART = ("commands", "triton", "__pycache__")
"""Folders of the package that no step runs, on a CPU."""
_SUFFIXES = (".py", ".c", ".h")


class Kept:
    """Results of one side, in files of a folder."""

    def __init__(self, folder: Path, side: str, versions: dict[str, Any]) -> None:
        """
        Args:
            folder: where models are written.
            side: "transformers" or "vllm".
            versions: side -> package -> version, of this side and of those that it needs.
        """
        self._folder, self._side = folder / "kept" / side, side
        self._models, self._versions = folder, versions

    def found(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Name -> line of the worker, of those that were kept and would be the same again."""
        lines = {name: self._read(name) for name in names}
        return {name: line for name, line in lines.items() if line and self._is_true(name, line)}

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line of the worker (see ``worker.py``)."""
        self._folder.mkdir(parents=True, exist_ok=True)
        line = {**line, "key": self._key(line["name"])}
        self._path(line["name"]).write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")

    def _is_true(self, name: str, line: dict[str, Any]) -> bool:
        """And vLLM finds what transformers' side says it saved."""
        saved = self._side == "vllm" or "generates" not in line["steps"]
        models = self._models / _entry(name).folder / "reference.json"
        return line["key"] == self._key(name) and (saved or models.exists())

    def _read(self, name: str) -> Any:
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _path(self, name: str) -> Path:
        return self._folder / f"{_entry(name).folder}.json"

    def _key(self, name: str) -> str:
        sides = ("transformers", "vllm")[: 1 + (self._side == "vllm")]
        parts = [self._versions[side] for side in sides]
        return _digest(json.dumps([parts, [_source(side) for side in sides], _recipe(name)]).encode())


def _entry(name: str) -> ModelClass:
    return ModelClass(*name.split("/"))


def _recipe(name: str) -> str:
    try:
        config = small_config(_entry(name)).to_dict()
        kind = _entry(name).model_type
        others = [UNBIASED.get(kind), kind in BFLOAT16, kind in TOKENIZED]
        return json.dumps([config, *others], sort_keys=True, default=str)
    except Exception as error:  # of transformers, of any kind: the class cannot be built
        return f"{type(error).__name__}: {error}"


@cache
def _source(side: str) -> str:
    paths = [path for given in _SOURCES[side] for path in sorted(_files(given))]
    return _digest(
        "".join(f"{path.relative_to(ROOT)} {_digest(path.read_bytes())}\n" for path in paths).encode()
    )


def _files(given: Path) -> Iterator[Path]:
    found = given.rglob("*") if given.is_dir() else [given]
    return (path for path in found if path.suffix in _SUFFIXES and not set(_NO_PART) & set(path.parts))


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()
