"""A basis as it is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.codec import uniform


@dataclass(frozen=True)
class QuantizedBasis:
    """A basis as it is stored.

    Attributes:
        codes: ``[rows, columns]`` uint8, or float16 values if ``bits`` is 16.
        scales: ``[rows, columns / group_size]`` float16 (empty if ``bits`` is 16).
        bits: 4, 8 or 16.
        group_size: values along a row that share a scale.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """``[rows, columns]`` float32."""
        if self.bits == 16:
            return self.codes.float()
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, -1, self.group_size).float()
        return uniform.decode(grouped, self.scales.float().unsqueeze(-1), self.bits).view(rows, columns)


def quantize_basis(basis: Tensor, bits: int, group_size: int) -> QuantizedBasis:
    """Round a basis to groups of ``group_size`` values along its rows.

    Args:
        basis: ``[rows, columns]`` float64.
        bits: 4, 8 or 16 (16 stores float16 values without scales).
        group_size: divides ``columns``.
    """
    if bits == 16:
        return QuantizedBasis(basis.to(torch.float16), basis.new_empty(0), bits, group_size)
    rows = basis.shape[0]
    grouped = basis.float().view(rows, -1, group_size)
    scale, _ = uniform.best_scale(grouped, torch.ones_like(grouped), bits)
    scale = scale.to(torch.float16)
    codes = uniform.encode(grouped, scale.float(), bits).view_as(basis).to(torch.uint8)
    return QuantizedBasis(codes, scale.squeeze(-1), bits, group_size)
