"""Linear layers outside the routed experts in 8 or 4 bits: what compressed-tensors' format holds of them.

The format is "pack-quantized": integers around zero, one scale per group of inputs, packed into int32. It is
written and read by the library (``runtime.dense_linear``); here is what can be told without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.errors import CheckpointError

BITS = (4, 8)
GROUP_SIZES = (32, 128)
UNIT = 32
"""Inputs and outputs of a layer are a multiple of it: kernels take no others."""
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, order=True)
class DenseScheme:
    """Attributes:
    bits: of a weight.
    group_size: inputs of a row that share a scale.
    """

    bits: int
    group_size: int

    @property
    def largest(self) -> int:
        """The largest code; the smallest is one further from zero."""
        return 2 ** (self.bits - 1) - 1

    def shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is stored of a layer."""
        return {
            PACKED: (outputs, inputs * self.bits // 32),
            SCALE: (outputs, inputs // self.group_size),
            SHAPE: (2,),
        }

    def weight_args(self) -> dict[str, Any]:
        """Arguments of compressed-tensors' ``QuantizationArgs``."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
        }


def dense_section(schemes: Mapping[str, DenseScheme]) -> dict[str, Any]:
    """A quantization_config of compressed-tensors for layers by their names in the files; {} for none."""
    groups: dict[str, Any] = {}
    for scheme in sorted(set(schemes.values())):
        groups[f"group_{len(groups)}"] = {
            "targets": sorted(name for name, own in schemes.items() if own == scheme),
            "weights": scheme.weight_args(),
            "input_activations": None,
            "output_activations": None,
        }
    if not groups:
        return {}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def dense_schemes(section: dict[str, Any]) -> dict[str, DenseScheme]:
    """The other way round: name of each layer in the files -> scheme.

    Raises:
        CheckpointError: the section is none that ``dense_section`` writes.
    """
    found: dict[str, DenseScheme] = {}
    try:
        for group in section["config_groups"].values() if section else ():
            weights, targets = group["weights"], group["targets"]
            scheme = DenseScheme(weights["num_bits"], weights["group_size"])
            sound = scheme.bits in BITS and scheme.group_size in GROUP_SIZES
            if not sound or not all(isinstance(name, str) for name in targets):
                raise ValueError
            found.update(dict.fromkeys(targets, scheme))
        sound = dense_section(found) == section
    except (KeyError, TypeError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            "quantization_config: dense is no section that this package writes (layers by name, "
            "pack-quantized, 4 or 8 bits, symmetric, groups of 32 or 128); config.json was altered"
        )
    return found


def dense_key(name: str) -> str:
    """The name of a layer or tensor without what stands before the decoder layers.

    That depends on the class that saves or loads a model: ``layers.3.self_attn.q_proj`` of
    ``model.language_model.layers.3.self_attn.q_proj``. Other names, of the head, stay.
    """
    match = re.fullmatch(r"(?:.*?\.)?(\w+\.\d+\..+)", name)
    return match[1] if match else name


def stored_size(packed: tuple[int, ...], scheme: DenseScheme) -> tuple[int, int]:
    """Outputs and inputs of a layer, from the shape of its packed words."""
    outputs, words = packed
    return outputs, words * 32 // scheme.bits


def with_unpacked(
    shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, DenseScheme]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape as files of the unquantized model would have them, of those of files that were checked.

    Args:
        schemes: by names of layers in the files.
    """
    found = dict(shapes)
    by_key = {dense_key(name): scheme for name, scheme in schemes.items()}
    for name in shapes:
        layer, _, part = name.rpartition(".")
        scheme = by_key.get(dense_key(layer)) if part == PACKED else None
        if scheme is not None:
            found[f"{layer}.weight"] = stored_size(found.pop(name), scheme)
            found.pop(f"{layer}.{SCALE}", None)
            found.pop(f"{layer}.{SHAPE}", None)
    return found


def check_stored(
    name: str, tensors: dict[str, Tensor], scheme: DenseScheme, shape: tuple[int, int] | None = None
) -> None:
    """Refuse stored tensors that are none of a layer.

    Args:
        shape: outputs and inputs; None: as the tensors say.

    Raises:
        CheckpointError: naming the tensor.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError(f"{name}: its tensors are on the meta device, without values")
    told = tuple(tensors[SHAPE].tolist())
    shape = shape or told  # type: ignore[assignment]
    assert shape is not None
    found = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    wanted = scheme.shapes(*shape) if len(told) == 2 and min(told) > 0 else {}
    if told != shape or found != wanted:
        raise CheckpointError(
            f"{name}: {SHAPE} says {told} and the tensors are {found}, but {shape} in {scheme.bits} bits "
            f"asks for {wanted}; the checkpoint was altered"
        )
    scales = tensors[SCALE]
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise CheckpointError(f"{name}.{SCALE} holds values that are no scales; the checkpoint was altered")
