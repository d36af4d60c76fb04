"""Row scales as they are stored: 5-bit codes on a logarithmic grid per rank index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.codec import uniform

SCALE_LEVELS = 32
"""A row's scale is one of 32 (5 bits), equally spaced in the logarithm; see ``ScaleGrid``."""
NEARBY = 2
"""Scale codes tried on either side of the planned one when a row's turn comes."""
_MAX_OCTAVES = 16.0
_HEADROOM_OCTAVES = 0.1


@dataclass(frozen=True)
class ScaleGrid:
    """Row scales of one factor and rank index over all experts: ``exp2(low + code * step)``.

    Attributes:
        low: ``[..., rank]`` float16, log2 of the smallest scale.
        step: ``[..., rank]`` float16, octaves between neighbouring codes.
    """

    low: Tensor
    step: Tensor

    @staticmethod
    def covering(scales: Tensor, used: Tensor) -> ScaleGrid:
        """The grid that spans the used ones of ``scales`` ``[..., experts, rank]`` (bool mask alike)."""
        log = scales.clamp_min(2.0**-60).log2()
        high = torch.where(used, log, -60.0).amax(-2)
        low = torch.where(used, log, 60.0).amin(-2).minimum(high)
        low = torch.maximum(low, high - _MAX_OCTAVES).to(torch.float16)
        # Float16 may round the step down; the headroom keeps the largest scale inside, and leaves
        # room for rows that grow when they take over the errors of others.
        step = (high + _HEADROOM_OCTAVES - low.float()).clamp_min(0) / (SCALE_LEVELS - 1)
        return ScaleGrid(low, step.to(torch.float16))

    def stacked_with(self, other: ScaleGrid) -> ScaleGrid:
        """One more factor's grid ``[rank]`` after these ``[factors, rank]``."""
        return ScaleGrid(torch.cat([self.low, other.low[None]]), torch.cat([self.step, other.step[None]]))

    def decode(self, codes: Tensor) -> Tensor:
        """Scales ``[..., experts, rank]`` float32 of codes alike."""
        return torch.exp2(self.low.float()[..., None, :] + codes * self.step.float()[..., None, :])

    def encode(self, scales: Tensor) -> Tensor:
        """Nearest codes ``[..., experts, rank]``, float32 whole numbers."""
        log = scales.clamp_min(2.0**-60).log2() - self.low.float()[..., None, :]
        return (log / self.step.float()[..., None, :].clamp_min(1e-6)).round_().clamp_(0, SCALE_LEVELS - 1)


def nearby_codes(
    rows: Tensor, weights: Tensor, bits: Tensor, start: Tensor, low: Tensor, step: Tensor
) -> Tensor:
    """Scale codes ``[...]`` uint8 near ``start`` ``[...]``, for rows ``[..., n]``.

    Judged on the uniform grid, which ranks neighbouring scales like the trellis, but is faster.

    Args:
        low, step: broadcast against ``start``, see ``ScaleGrid``.
    """
    offsets = torch.arange(-NEARBY, NEARBY + 1, device=start.device).view(-1, *[1] * start.dim())
    codes = (start + offsets).clamp(0, SCALE_LEVELS - 1)
    scales = torch.exp2(low + codes * step)
    width = bits[..., None]
    errors = [
        (uniform.round_to_grid(rows, scale[..., None], width) - rows).square_().mul_(weights).sum(-1)
        for scale in scales
    ]
    return codes.gather(0, torch.stack(errors).argmin(0)[None])[0].to(torch.uint8)
