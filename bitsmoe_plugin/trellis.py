"""Trellis-coded rows: the value of a code depends on the codes before it in its block of 32.

The last ``WINDOW`` bits of a block's bit string, read after the ``bits`` bits of value i, are its
window; a fixed table of 2**WINDOW values, trained for a unit Gaussian, maps windows to values
(a bit-shift trellis, as in QTIP, arXiv 2406.11235). Values still take ``bits`` bits each, but
their joint choice (Viterbi) comes much closer to the rate-distortion bound than rounding does:

    mean square error of a unit Gaussian    1 bit    2 bits   3 bits   4 bits
    best uniform grid                       0.363    0.119    0.0374   0.01154
    this trellis                            0.312    0.083    0.0221   0.0062
    bound, 4**-bits                         0.250    0.0625   0.0156   0.0039

The bit string of a block is closed to a ring (tail-biting), so that a block needs nothing but
its own words: decoding is parallel, and a tensor parallel shard is still a range of blocks.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from bitsmoe_plugin.trellis_tables import TABLES

WINDOW = 8
BLOCK = 32
WIDTHS = (1, 2, 3, 4)
"""Wider rows use the uniform grid: at 6 bits the window would hold hardly more than one code."""

STEP = 1 / 32
"""Unit of the stored tables (int8)."""

_LANES = 64
"""Blocks that are searched side by side, as vector lanes. 64 is 20 times faster than 16."""
_WARM = 24
"""Values on either side of a block's seam that settle its state there. More changes nothing."""

_UNREACHABLE = 1e30
_MAX_THREADS = numba.get_num_threads()


def table(bits: int) -> Tensor:
    """Values ``[2**WINDOW]`` float32 of a width's windows, for rows of standard deviation 1."""
    return torch.from_numpy(TABLES[bits].astype(np.float32) * STEP)


def windows(codes: Tensor, bits: int) -> Tensor:
    """Windows ``[..., blocks * 32]`` int64 of codes of the same shape, whole blocks."""
    ring = codes.to(torch.int64).unflatten(-1, (-1, BLOCK))
    result = ring.clone()
    for back in range(1, -(-WINDOW // bits)):
        result |= ring.roll(back, -1) << (bits * back)
    return (result & (2**WINDOW - 1)).flatten(-2)


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
        ``[n, columns]`` uint8, each below 2**bits.
    """
    return torch.from_numpy(encode_with(table(bits).numpy(), rows, weights, bits))


def encode_with(values: np.ndarray, rows: Tensor, weights: Tensor, bits: int) -> np.ndarray:
    """``encode`` with a table of one's own, ``[2**WINDOW]`` float32."""
    blocks = rows.reshape(-1, BLOCK).contiguous().numpy()
    # Only ratios of weights within a block matter; unit size keeps sums in float32's best range.
    scaled = weights.reshape(-1, BLOCK)
    scaled = scaled / scaled.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    numba.set_num_threads(min(torch.get_num_threads(), _MAX_THREADS))
    codes = _encode_blocks(blocks, scaled.contiguous().numpy(), values, bits)
    return codes.reshape(rows.shape)


@numba.njit(fastmath=True, cache=True)
def _advance(x, weights, values, bits, first, count, metric, trace):  # type: ignore[no-untyped-def]
    """Run the trellis over ``count`` values from ``first`` on, around the ring.

    Args:
        x, weights: ``[BLOCK, LANES]``.
        metric: ``[states, LANES]`` cost of the best path into every state, updated. A state is
            the lower WINDOW - bits bits of the window before.
        trace: ``[count, states, LANES]`` int32, the upper ``bits`` bits of the best window.
    """
    states, branches = 1 << (WINDOW - bits), 1 << bits
    after = np.empty_like(metric)
    best, choice = np.empty(_LANES, np.float32), np.empty(_LANES, np.int32)
    for step in range(count):
        i = (first + step) % BLOCK
        for state in range(states):
            best[:] = np.float32(_UNREACHABLE)
            for branch in range(branches):
                window = branch * states + state
                before, value, mark = window >> bits, values[window], np.int32(branch)
                for lane in range(_LANES):  # selects instead of branches, so that this vectorises
                    error = x[i, lane] - value
                    cost = metric[before, lane] + weights[i, lane] * error * error
                    better = cost < best[lane]
                    best[lane] = cost if better else best[lane]
                    choice[lane] = mark if better else choice[lane]
            for lane in range(_LANES):
                after[state, lane] = best[lane]
                trace[step, state, lane] = choice[lane]
        metric[:] = after


@numba.njit(fastmath=True, cache=True)
def _encode_lanes(x, weights, values, bits, codes):  # type: ignore[no-untyped-def]
    """Codes ``[LANES, BLOCK]`` uint8 of the blocks in the lanes of x ``[BLOCK, LANES]``."""
    states = 1 << (WINDOW - bits)
    metric = np.zeros((states, _LANES), np.float32)
    trace = np.empty((2 * _WARM, states, _LANES), np.int32)
    seam = np.empty(_LANES, np.int64)
    # First across the seam, to learn in which state the ring should be closed.
    _advance(x, weights, values, bits, 2 * BLOCK - _WARM, 2 * _WARM, metric, trace)
    for lane in range(_LANES):
        state = np.argmin(metric[:, lane])
        for step in range(2 * _WARM - 1, _WARM - 1, -1):
            state = (trace[step, state, lane] * states + state) >> bits
        seam[lane] = state
    metric[:] = np.float32(_UNREACHABLE)
    for lane in range(_LANES):
        metric[seam[lane], lane] = 0
    _advance(x, weights, values, bits, 0, BLOCK, metric, trace)
    for lane in range(_LANES):
        state = seam[lane]
        for step in range(BLOCK - 1, -1, -1):
            window = trace[step, state, lane] * states + state
            codes[lane, step] = window & ((1 << bits) - 1)
            state = window >> bits


@numba.njit(parallel=True, cache=True)
def _encode_blocks(blocks, weights, values, bits):  # type: ignore[no-untyped-def]
    count = blocks.shape[0]
    groups = (count + _LANES - 1) // _LANES
    codes = np.empty((groups * _LANES, BLOCK), np.uint8)
    for group in numba.prange(groups):
        start = group * _LANES
        used = min(_LANES, count - start)
        x = np.zeros((BLOCK, _LANES), np.float32)
        w = np.zeros((BLOCK, _LANES), np.float32)
        for lane in range(used):
            for i in range(BLOCK):
                x[i, lane] = blocks[start + lane, i]
                w[i, lane] = weights[start + lane, i]
        _encode_lanes(x, w, values, bits, codes[start : start + _LANES])
    return codes[:count]
