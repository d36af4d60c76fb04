"""What the headers of a checkpoint's files say of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bitsmoe_plugin.models.files import read_header


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        name: in the files.
        dtype: in the notation of safetensors.
        shape: of the tensor.
        size: in bytes.
        path: of its file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    path: Path

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype}, {list(self.shape)})"

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Name -> tensor, of safetensors files; no tensor is read.

    Raises:
        CheckpointError: a file is none.
    """
    found = {}
    for path in map(Path, files):
        for name, entry in read_header(path).items():
            start, end = entry["data_offsets"]
            found[name] = StoredTensor(
                name, str(entry.get("dtype")), tuple(entry["shape"]), end - start, path
            )
    return found
