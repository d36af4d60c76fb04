"""Round-to-nearest baseline: groups of expert weights, asymmetric grid, no calibration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers, layout_of


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Weights ``[..., n]`` after rounding groups of ``group_size`` values along the last axis.

    Each group spans its minimum to its maximum with 2**bits levels; scale in float16, zero point
    in ``bits`` bits.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    top = 2**bits - 1
    scale = ((high - low) / top).to(torch.float16).float().clamp_min(1e-8)
    zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale + zero).round().clamp(0, top)
    return ((codes - zero) * scale).flatten(-2).to(weight.dtype)


def bits_per_weight(bits: int, group_size: int) -> float:
    """Counted bits: codes, float16 scales, zero points of ``bits`` bits."""
    return bits + (16 + bits) / group_size


def quantize_rtn(model: nn.Module, bits: int, group_size: int) -> float:
    """Round all routed experts of ``model`` in place; returns counted bits per weight.

    Raises:
        QuantizationError: ``group_size`` does not divide a weight's input size.
    """
    for layer in find_moe_layers(model):
        for name in (layout_of(layer.module).input_name, "down_proj"):
            weight = getattr(layer.module, name).data
            if layout_of(layer.module).is_transposed:
                weight = weight.transpose(1, 2)
            if weight.shape[-1] % group_size:
                raise QuantizationError(
                    f"{layer.name}.{name}: group size {group_size} does not divide {weight.shape[-1]}"
                )
            weight.copy_(round_to_nearest(weight, bits, group_size))
    return bits_per_weight(bits, group_size)
