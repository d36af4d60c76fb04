"""Tensors of a model's files that go into its packed checkpoint as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import open_tensors
from bitsmoe_plugin.models.low_precision import LowPrecision
from bitsmoe_plugin.models.low_precision_decode import decoded, grouped


class CarriedTensors:
    """Read when the model is saved. Files stay open until then, so it does not matter if they are removed."""

    def __init__(self, places: Mapping[str, tuple[str, str]]) -> None:
        """
        Args:
            places: name of each tensor -> (safetensors file, name in it).

        Raises:
            CheckpointError: a file cannot be read.
        """
        self.places = dict(places)
        self._files: dict[str, Any] = {}
        self._seen: dict[str, tuple[int, int, int]] = {}
        for path in {path for path, _ in self.places.values()}:
            self._files[path] = open_tensors(path)
            self._seen[path] = _identity(path)

    def empty(self) -> dict[str, Tensor]:
        """Name -> tensor of this shape, without data."""
        shapes = {
            name: self._files[path].get_slice(stored).get_shape()
            for name, (path, stored) in self.places.items()
        }
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def bytes(self) -> int:
        """Of all of them."""
        return sum(tensor.nbytes for tensor in self.read().values())

    def read(self) -> dict[str, Tensor]:
        """Name -> tensor.

        Raises:
            CheckpointError: a file was written over since it was opened.
        """
        for path, seen in self._seen.items():
            now = _identity(path) if os.path.exists(path) else seen
            if now[0] == seen[0] and now != seen:  # another file of this name is none of ours
                raise CheckpointError(
                    f"{path} was written over since the model was loaded, and {self._first(path)} is to be "
                    "saved from it; load the model again"
                )
        return {name: self._files[path].get_tensor(stored) for name, (path, stored) in self.places.items()}

    def _first(self, path: str) -> str:
        return next(name for name, place in self.places.items() if place[0] == path)

    def __deepcopy__(self, memo: dict[int, Any]) -> CarriedTensors:
        return self  # of a copied model: the same tensors of the same files

    def __reduce__(self) -> tuple[Any, ...]:
        return CarriedTensors, (self.places,)


class DecodedTensors(CarriedTensors):
    """The same of a checkpoint in low precision: weights are decoded when they are read, scales left out."""

    def __init__(self, places: Mapping[str, tuple[str, str]], precision: LowPrecision, dtype: Any) -> None:
        """
        Args:
            places: as above, of weights and of all that belongs to them.
            precision: how they are stored.
            dtype: of weights once they are decoded.
        """
        super().__init__(places)
        self._precision, self._dtype = precision, dtype

    def empty(self) -> dict[str, Tensor]:
        """See above. Shapes are those that are stored."""
        return {name: parts[min(parts)] for name, parts in grouped(super().empty(), self._precision).items()}

    def read(self) -> dict[str, Tensor]:
        """See above."""
        found = grouped(super().read(), self._precision)
        return {name: decoded(name, found.pop(name), self._precision, self._dtype) for name in list(found)}

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedTensors, (self.places, self._precision, self._dtype)


def _identity(path: str) -> tuple[int, int, int]:
    """inode first."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns
