"""Triton kernels that round rows of mixed widths: the device's side of ``row_codec`` and
``feedback_rounding``.

Nothing waits for the host: every row brings its own width, and a launch treats all of them. What they
compute is defined in ``trellis.search``, ``uniform`` and ``scale_grid.nearby_codes``; sums are taken in
another order, so that a choice between nearly equal codes may differ.

The trellis needs no gathers. With S = 2**(8 - bits) states, window w leads from state w % S to state
w >> bits. So costs of all windows are the costs of the states, repeated for the windows' upper bits, and the
costs of the next states are the least of those that differ in the windows' lower bits: a reshape and a
minimum. The choices of eight steps are kept in one word per state, in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest_codes(x, scale, step, top):
    """Codes on the uniform grid, float32 whole numbers, of step ``step`` at scale 1."""
    tiny = 1.1754943508222875e-38
    code = tl.div_rn(x, tl.maximum(scale * step, tiny)) + top * 0.5
    code = tl.minimum(tl.maximum(code, 0.0), top)
    # The nearest whole number, halves to even: larger float32 values have no fraction.
    return (code + 12582912.0) - 12582912.0


@triton.jit
def _step(x, weight, metric, table, BITS: tl.constexpr):
    """One value further: costs ``[B, S]`` of the states before -> of those after, and choices alike.

    ``x``, ``weight`` ``[B]``; ``table`` ``[1, S, 2**BITS]``, the windows' values. A choice is
    the lower bits of the best window.
    """
    states: tl.constexpr = 1 << (8 - BITS)
    choices: tl.constexpr = 1 << BITS
    blocks: tl.constexpr = metric.shape[0]
    before = tl.broadcast_to(tl.expand_dims(metric, 1), [blocks, choices, states])
    before = tl.reshape(before, [blocks, states, choices])
    away = tl.expand_dims(tl.expand_dims(x, 1), 2) - table
    cost = before + tl.expand_dims(tl.expand_dims(weight, 1), 2) * (away * away)
    return tl.min(cost, axis=2, return_indices=True)


@triton.jit
def _value(start, i, keep, tail, scale):
    """Value ``i`` of blocks at pointers ``start`` over the scale; 0 from column ``tail`` of a block on."""
    x = tl.load(start + i, mask=keep & (i < tail), other=0.0)
    return tl.div_rn(x, tl.maximum(scale, 1.1754943508222875e-38) + tl.zeros_like(x))


@triton.jit
def _run(x_start, w_start, keep, tail, scale, largest, metric, table, BITS: tl.constexpr):
    """The trellis over all values of blocks: costs at the end, and choices in 4 words ``[B, S]`` of 8."""
    trace = ()
    for part in tl.static_range(4):
        word = tl.zeros(metric.shape, tl.uint32)
        for j in range(8):
            i = part * 8 + j
            weight = tl.div_rn(tl.load(w_start + i, mask=keep & (i < tail), other=0.0), largest)
            metric, choice = _step(_value(x_start, i, keep, tail, scale), weight, metric, table, BITS)
            word |= choice.to(tl.uint32) << (BITS * j)
        trace = trace + (word,)
    return metric, trace


@triton.jit
def _trace_back(
    trace, state, codes, values, tables, scale, store, tail, BITS: tl.constexpr, STORE: tl.constexpr
):
    """State where the best path into ``state`` ``[B]`` began; stores its codes and values if STORE."""
    states: tl.constexpr = 1 << (8 - BITS)
    every = tl.expand_dims(tl.arange(0, states), 0)
    for part in tl.static_range(4):
        for back in range(8):
            j = 7 - back
            here = every == tl.expand_dims(state, 1)
            # One of them is not 0.
            word = tl.sum(tl.where(here, trace[3 - part], 0).to(tl.int32, bitcast=True), axis=1)
            choice = (word.to(tl.uint32, bitcast=True) >> (BITS * j)).to(tl.int32) & ((1 << BITS) - 1)
            window = (state << BITS) | choice
            if STORE:
                i = (3 - part) * 8 + j
                tl.store(codes + i, window >> (8 - BITS), mask=store)
                value = tl.load(tables + (BITS - 1) * 256 + window) * scale
                tl.store(values + i, value, mask=store & (i < tail))
            state = window & (states - 1)
    return state


@triton.jit
def _search(x_start, w_start, codes, values, tables, scale, keep, tail, BITS: tl.constexpr):
    """Code blocks of one row by trellis; all pointers ``[B]`` to the blocks' first values."""
    states: tl.constexpr = 1 << (8 - BITS)
    choices: tl.constexpr = 1 << BITS
    window = tl.expand_dims(tl.arange(0, states), 1) * choices + tl.expand_dims(tl.arange(0, choices), 0)
    table = tl.expand_dims(tl.load(tables + (BITS - 1) * 256 + window), 0)
    column = tl.expand_dims(tl.arange(0, 32), 0)
    inside = tl.expand_dims(keep, 1) & (column < tl.expand_dims(tail, 1))
    weights = tl.load(tl.expand_dims(w_start, 1) + column, mask=inside, other=0.0)
    # Only ratios of weights within a block matter; unit size keeps sums in float32's best range.
    largest = tl.maximum(tl.max(weights, axis=1), 1.1754943508222875e-38)
    every = tl.expand_dims(tl.arange(0, states), 0)

    metric = tl.zeros([keep.shape[0], states], tl.float32)
    for i in range(8, 32):  # settles the state at the seam: viterbi._WARM
        weight = tl.div_rn(tl.load(w_start + i, mask=keep & (i < tail), other=0.0), largest)
        metric, _ = _step(_value(x_start, i, keep, tail, scale), weight, metric, table, BITS)
    metric, trace = _run(x_start, w_start, keep, tail, scale, largest, metric, table, BITS)
    best = tl.argmin(metric, axis=1)
    seam = _trace_back(trace, best, codes, values, tables, scale, keep, tail, BITS, False)
    begun = _trace_back(trace, seam, codes, values, tables, scale, keep, tail, BITS, True)
    again = keep & (begun != seam)
    if tl.max(again.to(tl.int32), axis=0) > 0:
        bound = tl.where(every == tl.expand_dims(seam, 1), 0.0, 1e30)
        _, closed = _run(x_start, w_start, keep, tail, scale, largest, bound, table, BITS)
        _trace_back(closed, seam, codes, values, tables, scale, again, tail, BITS, True)


_NUMBERS = ["size", "row_stride", "code_stride", "value_stride", "rows_per_weights"]
"""What compiled code does not depend on: compiling the trellis searches takes some seconds."""


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["rows", "weights", "codes", "values"])
def round_kernel(
    rows,
    scales,
    weights,
    widths,
    tables,
    steps,
    codes,
    values,
    size,
    row_stride,
    code_stride,
    value_stride,
    rows_per_weights,
    BLOCKS: tl.constexpr,
    TRELLIS: tl.constexpr,
):
    """Codes and values of BLOCKS blocks of a row. Grid: rows, parts of a row.

    ``scales``, ``widths`` ``[n]``; ``weights`` ``[n / rows_per_weights, size]``; ``tables`` ``[4, 256]``;
    ``steps`` ``[17]``. Codes are written up to whole blocks.
    """
    row = tl.program_id(0).to(tl.int64)
    width = tl.load(widths + row).to(tl.int32)
    scale = tl.load(scales + row)
    first = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)) * 32
    keep = first < size
    tail = size - first  # columns that the block has, 32 or more: all
    x_start, w_start = rows + row * row_stride + first, weights + (row // rows_per_weights) * size + first
    c_start, v_start = codes + row * code_stride + first, values + row * value_stride + first
    if TRELLIS and (width >= 1) and (width <= 4):
        if width == 1:
            _search(x_start, w_start, c_start, v_start, tables, scale, keep, tail, 1)
        if width == 2:
            _search(x_start, w_start, c_start, v_start, tables, scale, keep, tail, 2)
        if width == 3:
            _search(x_start, w_start, c_start, v_start, tables, scale, keep, tail, 3)
        if width == 4:
            _search(x_start, w_start, c_start, v_start, tables, scale, keep, tail, 4)
    else:
        step, top = tl.load(steps + width), ((1 << width) - 1).to(tl.float32)
        column = tl.expand_dims(tl.arange(0, 32), 0)
        whole = tl.expand_dims(keep, 1) & (column < 32)
        inside = whole & (column < tl.expand_dims(tail, 1))
        x = tl.load(tl.expand_dims(x_start, 1) + column, mask=inside, other=0.0)
        code = tl.where(inside, _nearest_codes(x, scale, step, top), 0.0)
        tl.store(tl.expand_dims(c_start, 1) + column, code.to(tl.int32), mask=whole)
        tl.store(tl.expand_dims(v_start, 1) + column, (code - top * 0.5) * (scale * step), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS[:2] + _NUMBERS[4:], do_not_specialize_on_alignment=["rows", "weights"])
def choose_kernel(
    rows,
    weights,
    widths,
    start,
    low,
    step,
    steps,
    scale_codes,
    scales,
    size,
    row_stride,
    rows_per_weights,
    NEARBY: tl.constexpr,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The scale code near ``start`` of least weighted squared error on the uniform grid. Grid: rows.

    All but ``rows`` and ``weights`` ``[n]``; COLUMNS: a power of two, a row is treated in parts of so many.
    """
    row = tl.program_id(0).to(tl.int64)
    width = tl.load(widths + row).to(tl.int32)
    unit, top = tl.load(steps + width), ((1 << width) - 1).to(tl.float32)
    begin, base, octaves = tl.load(start + row), tl.load(low + row), tl.load(step + row)
    x_start, w_start = rows + row * row_stride, weights + (row // rows_per_weights) * size
    best = float("inf")
    chosen = begin * 0.0
    for offset in range(2 * NEARBY + 1):
        code = tl.minimum(tl.maximum(begin + (offset - NEARBY), 0.0), LEVELS - 1.0)
        scale = tl.exp2(base + code * octaves)
        total = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, size, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            x = tl.load(x_start + column, mask=column < size, other=0.0)
            weight = tl.load(w_start + column, mask=column < size, other=0.0)
            away = (_nearest_codes(x, scale, unit, top) - top * 0.5) * (scale * unit) - x
            total += away * away * weight
        error = tl.sum(total, axis=0)
        better = error < best
        best = tl.where(better, error, best)
        chosen = tl.where(better, code, chosen)
    tl.store(scale_codes + row, chosen.to(tl.uint8))
    tl.store(scales + row, tl.exp2(base + chosen * octaves))


@triton.jit
def pack_kernel(codes, widths, starts, payload, size, BLOCKS: tl.constexpr):
    """Words of BLOCKS blocks of a row of codes ``[n, size]``, whole blocks. Grid: rows, parts of a row.

    ``starts`` ``[n]`` int64: where the row's words stand in ``payload``; see ``layout``.
    """
    row = tl.program_id(0).to(tl.int64)
    width = tl.load(widths + row).to(tl.int32)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    keep = block * 32 < size
    column = tl.expand_dims(tl.arange(0, 32), 0)
    place = codes + row * size + tl.expand_dims(block, 1) * 32 + column
    code = tl.load(place, mask=tl.expand_dims(keep, 1) & (column < 32), other=0).to(tl.int64)
    start = payload + tl.load(starts + row) + block * width
    for j in range(width):
        shift = column * width - 32 * j
        inside = (shift > -width) & (shift < 32)
        left, right = tl.maximum(tl.minimum(shift, 31), 0), tl.maximum(tl.minimum(-shift, 31), 0)
        moved = tl.where(shift >= 0, code << left, code >> right)
        # Their bits do not overlap, so that the sum joins them.
        word = tl.sum(tl.where(inside, moved & 0xFFFFFFFF, 0), axis=1)
        tl.store(start + j, word.to(tl.int32), mask=keep)
