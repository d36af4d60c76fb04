"""Products of few tokens with a basis, at both ends of ``decode``: each reads the whole basis by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.basis import PackedBasis
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target


def scaled(
    x: Tensor, ids: Tensor, basis: PackedBasis, state: LayerState, target: Target, launch: Launcher
) -> Tensor:
    """Coordinates of few tokens as their pairs read them: times scale and unit, in the order of the rows.

    Args:
        x: ``[T, H]`` contiguous, T > 0.
        ids: ``[T, k]`` integer; for what is not one of the experts nothing is written.
        basis: ``[n * r, H]``.

    Returns:
        ``[T * k, inputs, r]`` float32; after the last stored row nothing is written.
    """
    out = x.new_empty((ids.numel(), state.inputs, state.rank), dtype=torch.float32)
    rows, words = target.blocks.matvec
    constants = basis.constants() | {"ROWS": rows, "WORDS": words, "EXPERTS": state.experts}
    constants |= {"INPUTS": state.inputs, "RANK": state.rank, "UNITS": state.units_by_code}
    constants |= {"SLOTS": ids.shape[1], "SLOTS_2": triton.next_power_of_2(ids.shape[1])}
    arguments = {"x": x, "codes": basis.codes, "scales": basis.scales, "ids": ids, "scaled": out}
    arguments |= {"places": state.places, "row_codes": state.row_codes, "scale_grid": state.scale_grid}
    grid = (triton.cdiv(basis.codes.shape[0], rows), x.shape[0])
    launch(
        Launch(
            kernel=scaled_matvec_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=target.blocks.matvec_warps,
        )
    )
    return out


def summed(
    parts: Tensor, slots: int, basis: PackedBasis, dtype: torch.dtype, target: Target, launch: Launcher
) -> Tensor:
    """``[T, rows]`` of ``dtype``: ``[T * slots, columns]`` float32 summed over slots, times the basis."""
    tokens = len(parts) // slots
    out = parts.new_empty((tokens, basis.codes.shape[0]), dtype=dtype)
    rows, words = target.blocks.matvec
    constants = basis.constants() | {"ROWS": rows, "WORDS": words, "SLOTS": slots}
    arguments = {"x": parts, "codes": basis.codes, "scales": basis.scales, "out": out}
    grid = (triton.cdiv(basis.codes.shape[0], rows), tokens)
    launch(
        Launch(
            kernel=matvec_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=target.blocks.matvec_warps,
        )
    )
    return out


@triton.jit
def _separated(values, COUNT: tl.constexpr):
    """``[n * COUNT]`` as a tuple of ``COUNT`` tensors ``[n]``, those at i, i + COUNT and so on."""
    if COUNT == 1:
        return (values,)
    else:
        even, odd = tl.split(tl.reshape(values, [values.shape[0] // 2, 2]))
        evens, odds = _separated(even, COUNT // 2), _separated(odd, COUNT // 2)
        merged = ()
        for i in tl.static_range(COUNT // 2):
            merged = merged + (evens[i], odds[i])
        return merged


@triton.jit
def _row_sums(
    x,
    codes,
    scales,
    row,
    keep_row,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """``[rows]`` float32: rows of the basis times the sum of ``SLOTS`` vectors from ``x`` on."""
    EACH: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    total = tl.zeros([row.shape[0], WORDS], tl.float32)
    for first in range(0, ROW_WORDS, WORDS):
        word = first + tl.arange(0, WORDS)
        keep = keep_row[:, None] & (word < ROW_WORDS)[None, :]
        packed = tl.load(codes + row[:, None] * ROW_WORDS + word[None, :], mask=keep, other=0)
        column = first * EACH + tl.arange(0, WORDS * EACH)
        vector = tl.zeros([WORDS * EACH], tl.float32)
        for slot in tl.static_range(SLOTS):
            at = x + slot * COLUMNS + column
            vector += tl.load(at, mask=column < COLUMNS, other=0.0).to(tl.float32)
        if BITS == 16:
            total += packed.to(tl.float32) * vector[None, :]
        else:
            # Groups are multiples of 16 columns, so a word never straddles two.
            group = word * EACH // GROUP
            scale_at = scales + row[:, None] * (COLUMNS // GROUP) + group[None, :]
            in_columns = (group < COLUMNS // GROUP)[None, :]
            scale = tl.load(scale_at, mask=keep & in_columns, other=0.0).to(tl.float32) * STEP
            pieces = _separated(vector, EACH)
            unsigned = packed.to(tl.uint32, bitcast=True)
            products = tl.zeros(packed.shape, tl.float32)
            for i in tl.static_range(EACH):
                code = (unsigned >> (i * BITS)) & (2**BITS - 1)
                products += (code.to(tl.float32) - (2**BITS - 1) / 2) * pieces[i][None, :]
            total += scale * products
    return tl.sum(total, 1)


@triton.jit
def matvec_kernel(
    x,
    codes,
    scales,
    out,
    TOTAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """``summed`` for ``ROWS`` rows (axis 0) and one token (axis 1)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    keep = row < TOTAL_ROWS
    x += token * SLOTS * COLUMNS
    sums = _row_sums(x, codes, scales, row, keep, COLUMNS, ROW_WORDS, GROUP, BITS, STEP, WORDS, SLOTS)
    tl.store(out + token * TOTAL_ROWS + row, sums, mask=keep)


@triton.jit
def scaled_matvec_kernel(
    x,
    codes,
    scales,
    ids,
    scaled,
    places,
    row_codes,
    scale_grid,
    TOTAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    UNITS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_2: tl.constexpr,
):
    """``scaled`` for ``ROWS`` rows of the basis (axis 0) and one token (axis 1)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    keep_row = row < TOTAL_ROWS
    slot = tl.arange(0, SLOTS_2)
    expert = tl.load(ids + token * SLOTS + slot, mask=slot < SLOTS, other=-1).to(tl.int32)
    has_expert = (expert >= 0) & (expert < EXPERTS)
    z = _row_sums(
        x + token * COLUMNS,
        codes,
        scales,
        row,
        keep_row,
        COLUMNS,
        ROW_WORDS,
        GROUP,
        BITS,
        STEP,
        WORDS,
        1,
    )
    k = row % RANK
    for factor in tl.static_range(INPUTS):
        keep = keep_row
        if TOTAL_ROWS > RANK:  # a basis for each factor
            keep = keep_row & (row // RANK == factor)
        at = (factor * EXPERTS + expert)[:, None] * RANK + k[None, :]
        here = has_expert[:, None] & keep[None, :]
        place = tl.load(places + at, mask=here, other=0).to(tl.int32)
        code = tl.load(row_codes + at, mask=here, other=0).to(tl.int32)
        low = tl.load(scale_grid + factor * 2 * RANK + k, mask=keep, other=0.0).to(tl.float32)
        step = tl.load(scale_grid + (factor * 2 + 1) * RANK + k, mask=keep, other=0.0).to(tl.float32)
        unit = tl.zeros([SLOTS_2, ROWS], tl.float32)
        for i in tl.static_range(len(UNITS)):
            unit = tl.where(code >> 5 == i, UNITS[i], unit)
        scale = tl.exp2(low[None, :] + (code & 31).to(tl.float32) * step[None, :]) * unit
        at = ((token * SLOTS + slot) * INPUTS + factor)[:, None] * RANK + place
        tl.store(scaled + at, z[None, :] * scale, mask=here & (unit > 0))
