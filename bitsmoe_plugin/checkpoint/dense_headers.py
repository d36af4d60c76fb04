"""Linear layers in 8 or 4 bits as the headers of safetensors files describe them, before any is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitsmoe_plugin.codec.dense import (
    PACKED,
    SCALE,
    SCALE_DTYPES,
    SHAPE,
    UNIT,
    DenseScheme,
    dense_key,
    stored_size,
)
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import open_tensors, read_header

_DTYPES = {"I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES["F32"] = torch.float32


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer in 8 or 4 bits, as the files have it.

    Attributes:
        name: without the parts' names, in the files.
        outputs, inputs: of the layer.
        files: part -> file.
        bytes: stored.
    """

    name: str
    scheme: DenseScheme
    outputs: int
    inputs: int
    files: dict[str, Path]
    bytes: int

    def read(self) -> dict[str, Tensor]:
        """Part -> tensor."""
        tensors = {}
        for part, path in self.files.items():
            with open_tensors(path) as file:
                tensors[part] = file.get_tensor(f"{self.name}.{part}")
        return tensors


def dense_layers(files: Iterable[str | Path], schemes: Mapping[str, DenseScheme]) -> list[DenseLayer]:
    """Find the layers of a manifest in the files, whose headers alone are read.

    Args:
        schemes: by name in the files, as ``save_pretrained`` writes it.

    Raises:
        CheckpointError: naming a tensor that is missing, surplus, or of another dtype or shape.
    """
    found: dict[str, dict[str, tuple[str, Path, dict[str, object]]]] = {}
    for path in map(Path, files):
        for name, entry in read_header(path).items():
            layer, _, part = name.rpartition(".")
            if part in (PACKED, SCALE, SHAPE):
                found.setdefault(dense_key(layer), {})[part] = (layer, path, entry)
    layers = [_layer(name, scheme, found.pop(dense_key(name), {})) for name, scheme in schemes.items()]
    for parts in found.values():
        for part, (layer, _, _) in parts.items():
            raise CheckpointError(
                f"{layer}.{part} is in the checkpoint, but not in its quantization_config (dense)"
            )
    return layers


def _layer(
    name: str, scheme: DenseScheme, parts: dict[str, tuple[str, Path, dict[str, object]]]
) -> DenseLayer:
    for part in (PACKED, SCALE, SHAPE):
        if part not in parts:
            raise CheckpointError(f"{name}.{part} is missing from the checkpoint")
    headers = {part: (_DTYPES.get(str(e["dtype"])), _sizes(e)) for part, (_, _, e) in parts.items()}
    packed = headers[PACKED][1]
    outputs, inputs = stored_size(packed, scheme) if len(packed) == 2 else (0, 0)
    wanted = scheme.shapes(outputs, inputs)
    dtypes = {PACKED: (torch.int32,), SCALE: SCALE_DTYPES, SHAPE: (torch.int64,)}
    sound = outputs > 0 and outputs % UNIT == 0 and inputs > 0 and inputs % scheme.group_size == 0
    for part, (dtype, shape) in headers.items():
        if not sound or dtype not in dtypes[part] or shape != wanted[part]:
            raise CheckpointError(
                f"{name}.{part} is {parts[part][2]['dtype']} {shape}, which is no part of a layer in "
                f"{scheme.bits} bits and groups of {scheme.group_size} whose {PACKED} is {packed}; the "
                "checkpoint was altered"
            )
    size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in headers.values() if dtype)
    files = {part: path for part, (_, path, _) in parts.items()}
    return DenseLayer(
        name=parts[PACKED][0], scheme=scheme, outputs=outputs, inputs=inputs, files=files, bytes=size
    )


def _sizes(entry: dict[str, object]) -> tuple[int, ...]:
    shape = entry["shape"]
    return tuple(shape) if isinstance(shape, (list, tuple)) else ()
