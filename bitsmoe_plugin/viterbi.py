"""Search for the best trellis codes of many blocks at once (numba; needed to quantize only).

A Viterbi search per block of 32 values. The ring of a block is closed in two passes: the first
runs across the seam to learn a good state there, the second is bound to begin and end in it.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from bitsmoe_plugin.trellis import BLOCK, WINDOW

_LANES = 64
"""Blocks that are searched side by side, as vector lanes. 64 is 20 times faster than 16."""
_WARM = 24
"""Values on either side of a block's seam that settle its state there. Error of a 2-bit Gaussian
at 12, 16, 24 and 32: 0.0829, 0.0816, 0.0801, 0.0795."""
_UNREACHABLE = 1e30
_MAX_THREADS = numba.get_num_threads()


def search(values: np.ndarray, rows: Tensor, weights: Tensor, bits: int) -> np.ndarray:
    """Codes of least weighted squared error, up to the choice of the state at a block's seam.

    Args:
        values: ``[2**WINDOW]`` float32, what each window decodes to.
        rows: ``[n, columns]`` float32, columns a multiple of 32.
        weights: ``[n, columns]`` float32, importance of each value, not negative.
        bits: 1 to 4.

    Returns:
        ``[n, columns]`` uint8, each below 2**bits.
    """
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
            the upper WINDOW - bits bits of the window before.
        trace: ``[count, states, LANES]`` int32, the lower ``bits`` bits of the best window.
    """
    states, branches = 1 << (WINDOW - bits), 1 << bits
    after = np.empty_like(metric)
    best, choice = np.empty(_LANES, np.float32), np.empty(_LANES, np.int32)
    for step in range(count):
        i = (first + step) % BLOCK
        for state in range(states):
            best[:] = np.float32(_UNREACHABLE)
            for branch in range(branches):
                window = (state << bits) | branch
                before, value, mark = window & (states - 1), values[window], np.int32(branch)
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
            state = ((state << bits) | trace[step, state, lane]) & (states - 1)
        seam[lane] = state
    metric[:] = np.float32(_UNREACHABLE)
    for lane in range(_LANES):
        metric[seam[lane], lane] = 0
    _advance(x, weights, values, bits, 0, BLOCK, metric, trace)
    for lane in range(_LANES):
        state = seam[lane]
        for step in range(BLOCK - 1, -1, -1):
            window = (state << bits) | trace[step, state, lane]
            codes[lane, step] = window >> (WINDOW - bits)
            state = window & (states - 1)


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
