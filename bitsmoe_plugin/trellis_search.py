"""Search for the best codes of trellis-coded blocks (Viterbi), compiled by numba."""

from __future__ import annotations

import numba
import numpy as np

from bitsmoe_plugin.trellis import BLOCK, WINDOW

_LANES = 64
"""Blocks that are searched side by side, as vector lanes. 64 is 20 times faster than 16."""
_WARM = 24
"""Values on either side of a block's seam that settle its state there. More changes nothing."""

_UNREACHABLE = 1e30
_MAX_THREADS = numba.get_num_threads()


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


def search(
    blocks: np.ndarray, weights: np.ndarray, values: np.ndarray, bits: int, threads: int
) -> np.ndarray:
    """Codes ``[blocks, BLOCK]`` uint8.

    Args:
        blocks: ``[blocks, BLOCK]`` float32.
        weights: of the same shape.
        values: ``[2**WINDOW]`` float32, the table.
        bits: member of ``trellis.WIDTHS``.
        threads: use at most so many.
    """
    numba.set_num_threads(min(threads, _MAX_THREADS))
    return _encode_blocks(blocks, weights, values, bits)
