"""Hidden states in files: how they are named there, and a stream of them that is read chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.work_directory import WorkDirectory
from bitsmoe_plugin.calibration.carried import Carried, Left, left_beside


def numbered(name: str, hidden: list[Tensor]) -> dict[str, Tensor]:
    """Names in a file: ``name.batch``, and ``name.batch.part.key`` of what was left beside it."""
    found = {f"{name}.{i}": tensor for i, tensor in enumerate(hidden)}
    for i, left in enumerate(left_beside(hidden)):
        for key, tensors in left.items():
            found |= {f"{name}.{i}.{j}.{key}": tensor for j, tensor in enumerate(tensors)}
    return found


def listed(name: str, tensors: dict[str, Tensor], device: torch.device) -> Carried:
    """The inverse of ``numbered``. Copies: how matrix products are rounded may depend on where their operands
    are in memory."""
    own = {
        tuple(key.split(".", 3)[1:]): tensor.clone().to(device)
        for key, tensor in tensors.items()
        if key.startswith(f"{name}.")
    }
    batches = range(sum(len(place) == 1 for place in own))
    left: list[Left] = [{} for _ in batches]
    for number, part, key in sorted((p for p in own if len(p) == 3), key=lambda p: int(p[1])):
        left[int(number)][key] = (*left[int(number)].get(key, ()), own[number, part, key])
    return Carried((own[(str(number),)] for number in batches), left)


@dataclass(frozen=True)
class HiddenFiles:
    """Hidden states on their way through a model, in a work directory: each layer's inputs, chunk by chunk.

    Attributes:
        name: of the stream, letters.
        device: of what is read.
    """

    directory: WorkDirectory
    name: str
    device: torch.device

    def _file(self, layer: int, chunk: int) -> str:
        return f"{self.name}-{layer}-{chunk}.safetensors"

    def write(self, layer: int, chunk: int, hidden: list[Tensor]) -> None:
        """Keep inputs of a layer; counts with the directory's next ``commit``."""
        self.directory.write(self._file(layer, chunk), numbered("hidden", hidden))

    def read(self, layer: int, chunk: int) -> Carried:
        """Inputs of a layer, in memory of their own."""
        return listed("hidden", self.directory.read(self._file(layer, chunk))[0], self.device)

    def forget(self, layer: int, chunks: int) -> None:
        """Drop inputs of a layer that nobody needs after the next ``commit``."""
        for chunk in range(chunks):
            self.directory.forget(self._file(layer, chunk))
