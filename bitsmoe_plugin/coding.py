"""Rows to codes and back, each row at its own width and scale: by trellis or on the uniform grid.

``grid="trellis"`` codes rows of ``trellis.WIDTHS`` by trellis and wider ones on the uniform grid,
``grid="uniform"`` all on the uniform grid. Codes are padded to whole blocks of 32 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin import grids, trellis

BLOCK = trellis.BLOCK
GRIDS = ("trellis", "uniform")

# Mean square error of a unit Gaussian relative to the uniform grid of the same width.
_TRELLIS_GAIN = {1: 0.838, 2: 0.657, 3: 0.536, 4: 0.466}


def padded(size: int) -> int:
    """``size`` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def uses_trellis(width: int, grid: str) -> bool:
    """Whether rows of this width are trellis-coded."""
    return grid == "trellis" and width in trellis.WIDTHS


def expected_gain(width: int, grid: str) -> float:
    """Distortion of a row relative to the uniform grid's, for a Gaussian row."""
    return _TRELLIS_GAIN[width] if uses_trellis(width, grid) else 1.0


def encode(rows: Tensor, scales: Tensor, weights: Tensor, bits: Tensor, grid: str) -> Tensor:
    """Codes of rows.

    Args:
        rows: ``[..., n]`` float32.
        scales: ``[...]`` float32, positive where bits are.
        weights: broadcast against ``rows``: importance of each value.
        bits: ``[...]`` int64; 0 gives zeros.

    Returns:
        ``[..., padded(n)]`` int32.
    """
    n = rows.shape[-1]
    codes = torch.zeros(*rows.shape[:-1], padded(n), dtype=torch.int32)
    weights = weights.expand_as(rows)
    for width in torch.unique(bits).tolist():
        if width == 0:
            continue
        pick = bits == width
        chosen, scale = rows[pick], scales[pick][:, None]
        if uses_trellis(width, grid):
            fill = (0, codes.shape[-1] - n)
            scaled = torch.nn.functional.pad(chosen / scale, fill)
            coded = trellis.encode(scaled, torch.nn.functional.pad(weights[pick], fill), width)
            codes[pick] = coded.to(torch.int32)
        else:
            codes[..., :n][pick] = grids.encode(chosen, scale, width).to(torch.int32)
    return codes


def round_rows(rows: Tensor, scales: Tensor, weights: Tensor, bits: Tensor, grid: str) -> Tensor:
    """``decode(encode(rows))``."""
    return decode(encode(rows, scales, weights, bits, grid), scales, bits, rows.shape[-1], grid)


def decode_width(codes: Tensor, scales: Tensor, width: int, size: int, grid: str) -> Tensor:
    """Values ``[..., size]`` float32 of codes ``[..., padded(size)]`` of one width, scales ``[...]``."""
    if uses_trellis(width, grid):
        return trellis.decode(codes, width)[..., :size] * scales[..., None]
    return grids.decode(codes[..., :size].float(), scales[..., None], width)


def decode(codes: Tensor, scales: Tensor, bits: Tensor, size: int, grid: str) -> Tensor:
    """As ``decode_width`` with a width per row, ``[...]`` int64; zeros at width 0."""
    values = torch.zeros(*codes.shape[:-1], size)
    for width in torch.unique(bits).tolist():
        if width:
            pick = bits == width
            values[pick] = decode_width(codes[pick], scales[pick], width, size, grid)
    return values
