"""Packed tensors as the headers of safetensors files describe them, before any is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import open_tensors, tensor_files
from bitsmoe_plugin.models.layer_names import stored_key

_DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}


@dataclass(frozen=True)
class StoredTensor:
    """A packed tensor as a file's header describes it; dtype in the notation of safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    def read(self) -> Tensor:
        """The tensor itself."""
        with open_tensors(self.file) as file:
            return file.get_tensor(self.name)


def stored_tensors(files: Iterable[str | Path]) -> dict[tuple[str, str], StoredTensor]:
    """``stored_key`` -> every packed tensor of some safetensors files, read from the headers alone.

    Raises:
        CheckpointError: a file is no safetensors file, a name stands twice, or two tensors have the same
            key.
    """
    found: dict[tuple[str, str], StoredTensor] = {}
    paths = [Path(file) for file in files]
    tensor_files(paths)
    for path in paths:
        with open_tensors(path) as file:  # it refuses what the header says and the file is not
            names = [name for name in list(file.keys()) if ".bitsmoe_" in name]
            slices = {name: file.get_slice(name) for name in names}
            tensors = [
                StoredTensor(name, header.get_dtype(), tuple(header.get_shape()), path)
                for name, header in slices.items()
            ]
        for tensor in tensors:
            twin = found.setdefault(stored_key(tensor.name), tensor)
            if twin is not tensor:
                raise CheckpointError(f"{tensor.name} in {path} stands a second time in {twin.file}")
    return found


def verify_headers(found: dict[tuple[str, str], StoredTensor], specs: dict[str, PackedSpec]) -> None:
    """Refuse packed tensors that are not exactly those of the config, before any is read.

    Args:
        found: from ``stored_tensors``.
        specs: module path of each layer -> its sizes.

    Raises:
        CheckpointError: naming the tensor that is missing, surplus or of another dtype or shape.
    """
    surplus = dict(found)
    for layer, spec in specs.items():
        for buffer, (dtype, shape) in spec.tensors().items():
            tensor = surplus.pop(stored_key(f"{layer}.{buffer}"), None)
            if tensor is None:
                raise CheckpointError(f"{layer}.{buffer} is missing from the checkpoint")
            if (_DTYPES.get(tensor.dtype), tensor.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{tensor.name} is {tensor.dtype} {tensor.shape}, but the config asks for {dtype} "
                    f"{shape}; the checkpoint was altered or belongs to another config"
                )
    if surplus:
        name = next(iter(surplus.values())).name
        raise CheckpointError(f"{name} is in the checkpoint, but not in its quantization_config")
