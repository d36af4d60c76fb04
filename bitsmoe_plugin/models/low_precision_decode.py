"""Single weights in low precision that no model has a place for, decoded by the operation of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.models.low_precision import FUSED, LowPrecision

_RENAMED = {"scale": "weight_scale_inv", "qscale_weight": "weight_scale_inv"}
"""Other names for scales, as transformers renames them where a weight is beside."""
_WEIGHTS = ("weight", "weight_packed")


def is_weight(name: str) -> bool:
    """Whether a stored tensor is a weight, not what belongs to one."""
    return name.rpartition(".")[2] in (*_WEIGHTS, *FUSED)


def grouped(tensors: Mapping[str, Tensor], precision: LowPrecision) -> dict[str, dict[str, Tensor]]:
    """Weights with all that belongs to them.

    Args:
        tensors: by their stored names.

    Returns:
        name of a weight, or of any other tensor -> parts by the names that transformers has for them.
    """
    known = {part for parts in precision.quantizer.serialized_names.values() for part in parts}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        fused = name.removesuffix("_scale_inv")
        if fused.endswith(FUSED) and f"{fused}_scale_inv" in tensors:
            part = "weight" if name == fused else "weight_scale_inv"
            found.setdefault(fused, {})[part] = tensor
            continue
        base, _, end = name.rpartition(".")
        part = _RENAMED.get(end, end)
        beside = any(f"{base}.{weight}" in tensors for weight in _WEIGHTS)
        belongs = beside and part in known
        found.setdefault(f"{base}.weight" if belongs else name, {})[part if belongs else end] = tensor
    return found


class _Holder:
    """What the operation asks for the dtype of a weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._empty = torch.empty(0, dtype=dtype)

    def get_parameter(self, name: str) -> Tensor:
        return self._empty


def decoded(name: str, parts: Mapping[str, Tensor], precision: LowPrecision, dtype: torch.dtype) -> Tensor:
    """A weight of what is stored for it; a tensor that is stored alone, as it is.

    Args:
        name: of the weight.
        parts: from ``grouped``.
        dtype: of the weight.
    """
    if len(parts) == 1:
        (tensor,) = parts.values()
        return tensor
    expert = ".experts." in name
    if precision.method == "compressed-tensors":
        operation, model = precision.operation(expert), _Holder(dtype)
        out: dict[str, Any] = operation.convert(dict(parts), [], [], full_layer_name=name, model=model)
    else:
        out = precision.operation(expert).convert(dict(parts))
    (weight,) = out.values()
    return weight.to(dtype)
