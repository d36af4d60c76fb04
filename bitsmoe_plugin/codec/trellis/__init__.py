"""Trellis-coded rows: the value of a code depends on the codes before it in its block of 32.

The codes of a block, ``bits`` bits each and least significant bit first, make one bit string. The
``WINDOW`` bits of it that end with the bits of code i are the window of value i; a fixed table of
2**WINDOW values, trained for a unit Gaussian, maps windows to values (a bit-shift trellis, as in
QTIP, arXiv 2406.11235). Values still take ``bits`` bits each, but
their joint choice (Viterbi) comes much closer to the rate-distortion bound than rounding does:

    mean square error of a unit Gaussian    1 bit    2 bits   3 bits   4 bits
    best uniform grid                       0.363    0.119    0.0374   0.01154
    this trellis                            0.305    0.078    0.0201   0.0054
    bound, 4**-bits                         0.250    0.0625   0.0156   0.0039

The bit string of a block is closed to a ring (tail-biting), so that a block needs nothing but
its own words: decoding is parallel, and a tensor parallel shard is still a range of blocks.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.trellis import search
from bitsmoe_plugin.codec.trellis.tables import TABLES

WINDOW = search.WINDOW
WIDTHS = (1, 2, 3, 4)
"""Wider rows use the uniform grid: at 6 bits the window would hold hardly more than one code."""

STEP = 1 / 32
"""Unit of the stored tables (int8)."""


@cache
def table(bits: int) -> Tensor:
    """Values ``[2**WINDOW]`` float32 of a width's windows, for rows of standard deviation 1."""
    return torch.from_numpy(TABLES[bits].astype(np.float32) * STEP)


def windows(codes: Tensor, bits: int) -> Tensor:
    """Windows ``[..., blocks * 32]`` int64 of codes of the same shape, whole blocks."""
    ring = codes.to(torch.int64).unflatten(-1, (-1, BLOCK))
    result = torch.zeros_like(ring)
    for back in range(-(-WINDOW // bits)):
        code, place = ring.roll(back, -1), WINDOW - bits * (back + 1)
        result |= code << place if place >= 0 else code >> -place
    return result.flatten(-2)


def decode(codes: Tensor, bits: int) -> Tensor:
    """Values ``[..., n]`` float32 at scale 1 of codes ``[..., n]``, n a multiple of 32."""
    return table(bits).to(codes.device)[windows(codes, bits)]


def encode(rows: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Codes of least weighted squared error, up to the choice of the state at a block's seam.

    Args:
        rows: ``[n, columns]`` float32 at scale 1, columns a multiple of 32.
        weights: ``[n, columns]`` float32, importance of each value, not negative.
        bits: member of ``WIDTHS``.

    Returns:
        ``[n, columns]`` int32, each below 2**bits.
    """
    return search.search(table(bits).to(rows.device), rows, weights, bits)
