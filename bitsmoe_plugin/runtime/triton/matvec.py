"""Products of few tokens with a basis, at both ends of ``decode``: each token reads the basis by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.basis import PackedBasis, basis_value
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target


def scaled(
    x: Tensor,
    ids: Tensor,
    basis: PackedBasis,
    arrived: Tensor,
    state: LayerState,
    target: Target,
    launch: Launcher,
) -> Tensor:
    """Coordinates of few tokens as their pairs read them: times scale and unit, in the order of the rows.

    Args:
        x: ``[T, H]`` contiguous, T > 0.
        ids: ``[T, k]`` integer; for what is not one of the experts nothing is written.
        basis: ``[n * r, H]``.
        arrived: ``[1]`` int32, set to 0 for ``decode_output``.

    Returns:
        ``[T * k, inputs, r]`` float32; after the last stored row nothing is written.
    """
    out = x.new_empty((ids.numel(), state.inputs, state.rank), dtype=torch.float32)
    rows, words = target.blocks.matvec
    constants = basis.constants() | {"ROWS": rows, "WORDS": words, "EXPERTS": state.experts}
    constants |= {
        "GRID": state.grid,
        "INPUTS": state.inputs,
        "RANK": state.rank,
        "UNITS": state.units_by_code,
    }
    constants |= {"SLOTS": ids.shape[1], "SLOTS_2": triton.next_power_of_2(ids.shape[1])}
    arguments = {"x": x, "codes": basis.codes, "scales": basis.scales, "ids": ids, "scaled": out}
    arguments["arrived"] = arrived
    arguments |= {"places": state.places, "row_codes": state.row_codes, "scale_grid": state.scale_grid}
    arguments |= {"row_starts": state.row_starts, "row_gains": state.row_gains}
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
def basis_words(
    codes,
    scales,
    row,
    word,
    keep_row,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
):
    """Words ``[rows, words]`` of rows of a basis, 0 where there are none, and their scales, alike.

    Of 16 bits, the values themselves, and no scales.
    """
    keep = keep_row[:, None] & (word < ROW_WORDS)[None, :]
    packed = tl.load(codes + row[:, None] * ROW_WORDS + word[None, :], mask=keep, other=0)
    if BITS == 16:
        return packed, packed
    else:
        # Groups are multiples of 16 columns, so a word never straddles two.
        group = word * (32 // BITS) // GROUP
        at = scales + row[:, None] * (COLUMNS // GROUP) + group[None, :]
        return packed, tl.load(at, mask=keep & (group < COLUMNS // GROUP)[None, :], other=0.0)


@triton.jit
def basis_products(packed, scale, vector, BITS: tl.constexpr, STEP: tl.constexpr):
    """``[rows, words]`` float32, to be summed over words: ``basis_words`` times a vector of their columns."""
    if BITS == 16:
        return packed.to(tl.float32) * vector[None, :]
    else:
        EACH: tl.constexpr = 32 // BITS
        pieces = _separated(vector, EACH)
        unsigned = packed.to(tl.uint32, bitcast=True)
        products = tl.zeros(packed.shape, tl.float32)
        for i in tl.static_range(EACH):
            code = (unsigned >> (i * BITS)) & (2**BITS - 1)
            if STEP == 0:  # products of codes and scales are rounded
                products += basis_value(code, scale.to(tl.float32), BITS, STEP) * pieces[i][None, :]
            else:
                products += basis_value(code, 1.0, BITS, 1.0) * pieces[i][None, :]
        return products if STEP == 0 else products * (scale.to(tl.float32) * STEP)


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
):
    """``[rows]`` float32: rows of the basis times the vector at ``x``."""
    EACH: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    total = tl.zeros([row.shape[0], WORDS], tl.float32)
    for first in range(0, ROW_WORDS, WORDS):
        word = first + tl.arange(0, WORDS)
        packed, scale = basis_words(codes, scales, row, word, keep_row, COLUMNS, ROW_WORDS, GROUP, BITS)
        column = first * EACH + tl.arange(0, WORDS * EACH)
        vector = tl.load(x + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        total += basis_products(packed, scale, vector, BITS, STEP)
    return tl.sum(total, 1)


@triton.jit
def scaled_matvec_kernel(
    x,
    codes,
    scales,
    ids,
    scaled,
    arrived,
    places,
    row_codes,
    scale_grid,
    row_starts,
    row_gains,
    TOTAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    EXPERTS: tl.constexpr,
    GRID: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    UNITS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_2: tl.constexpr,
):
    """``scaled`` for ``ROWS`` rows of the basis (axis 0) and one token (axis 1)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    if (tl.program_id(0) == 0) & (token == 0):
        tl.store(arrived, 0)
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
        unit = tl.zeros([SLOTS_2, ROWS], tl.float32)
        for i in tl.static_range(len(UNITS)):
            unit = tl.where(code >> 5 == i, UNITS[i], unit)
        if GRID == "tiled":
            start = tl.load(row_starts + factor * EXPERTS + expert, mask=has_expert, other=0)
            stored = here & (unit > 0)
            scale = tl.load(row_gains + start[:, None] + place, mask=stored, other=0.0).to(tl.float32)
        else:
            low = tl.load(scale_grid + factor * 2 * RANK + k, mask=keep, other=0.0).to(tl.float32)
            step = tl.load(scale_grid + (factor * 2 + 1) * RANK + k, mask=keep, other=0.0).to(tl.float32)
            scale = tl.exp2(low[None, :] + (code & 31).to(tl.float32) * step[None, :]) * unit
        at = ((token * SLOTS + slot) * INPUTS + factor)[:, None] * RANK + place
        tl.store(scaled + at, z[None, :] * scale, mask=here & (unit > 0))
