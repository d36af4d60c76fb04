"""Whole-number codes with a float16 scale per 128 values: the grid "tiled" of converted checkpoints.

The method authors' checkpoints (``upstream``) have it; nothing is quantized to it here. A row of b bits is

    value[i] = float16(q[i] * scale[i // 128]) * gain

with q = code - 2**(b - 1), 2 * code - 1 at one bit, and at 16 bits the float16 whose bits the code is. The
rounding of the product to float16 is part of the grid; everything else is exact in float32. A basis of 8 bits
is the same without gains.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
"""Values that share a scale."""


def tiles(size: int) -> int:
    """Scales of a row of ``size`` values."""
    return -(-size // TILE)


def whole_numbers(codes: Tensor, width: int) -> Tensor:
    """q ``[..., n]`` float32 of codes ``[..., n]`` integer."""
    if width == 16:
        return codes.to(torch.int16).view(torch.float16).float()
    if width == 1:
        return (2 * codes - 1).float()
    return (codes - 2 ** (width - 1)).float()


def decode(codes: Tensor, width: int, scales: Tensor) -> Tensor:
    """Values without gains.

    Args:
        codes: ``[..., n]`` int32.
        scales: ``[..., tiles(n)]`` float16.

    Returns:
        ``[..., n]`` float32, all of them float16 values.
    """
    each = scales.float().repeat_interleave(TILE, -1)[..., : codes.shape[-1]]
    return (whole_numbers(codes, width) * each).half().float()
