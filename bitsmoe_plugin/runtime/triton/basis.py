"""Products with a basis of 4, 8 or 16 bits: matrix-vector for one token, tensor cores for more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.codec.uniform import STEP
from bitsmoe_plugin.runtime.triton.rows import interleaved
from bitsmoe_plugin.runtime.triton.target import Target


@dataclass(frozen=True)
class PackedBasis:
    """A stored basis, see ``layout``.

    Attributes:
        codes: ``[rows, words]`` int32, or ``[rows, columns]`` float16 if ``bits`` is 16.
        scales: ``[rows, columns / group_size]`` float16 (empty if ``bits`` is 16).
        bits: 4, 8 or 16.
        columns: values per row.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    columns: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, bits: int, columns: int) -> PackedBasis:
        """From the stored tensors, whose float16 values are held as int16."""
        dense = codes.view(torch.float16) if bits == 16 else codes
        return cls(dense.contiguous(), scales.view(torch.float16).contiguous(), bits, columns)

    def constants(self) -> dict[str, object]:
        """What both kernels are compiled for."""
        group = 1 if self.bits == 16 else self.columns // self.scales.shape[1]
        return {
            "TOTAL_ROWS": self.codes.shape[0],
            "COLUMNS": self.columns,
            "ROW_WORDS": self.codes.shape[1],
            "GROUP": group,
            "BITS": self.bits,
            "STEP": STEP[self.bits],
        }


def multiply(x: Tensor, basis: PackedBasis, dtype: torch.dtype, target: Target, launch: Launcher) -> Tensor:
    """``x @ basis.T``.

    Args:
        x: ``[T, columns]`` contiguous, T > 0.
        dtype: of the result. Sums are float32; ``target.operand`` of the narrower of ``x`` and the
            result is the dtype in which matrix products take their factors.

    Returns:
        ``[T, rows]``.
    """
    out = x.new_empty((x.shape[0], basis.codes.shape[0]), dtype=dtype)
    if x.shape[0] <= target.blocks.matvec_tokens:
        launch(_matvec(x, basis, out, target))
    else:
        launch(_matmul(x, basis, out, target))
    return out


def _matvec(x: Tensor, basis: PackedBasis, out: Tensor, target: Target) -> Launch:
    rows, words = target.blocks.matvec
    constants = {**basis.constants(), "ROWS": rows, "WORDS": words}
    launch_grid = (triton.cdiv(basis.codes.shape[0], rows), x.shape[0])
    arguments = {"x": x, "codes": basis.codes, "scales": basis.scales, "out": out}
    return Launch(
        kernel=matvec_kernel,
        launch_grid=launch_grid,
        arguments=arguments,
        constants=constants,
        num_warps=target.blocks.matvec_warps,
    )


def _matmul(x: Tensor, basis: PackedBasis, out: Tensor, target: Target) -> Launch:
    tokens, rows, columns = target.blocks.matmul
    tokens = min(tokens, max(16, triton.next_power_of_2(x.shape[0])))
    constants = basis.constants()
    # A step lies within one group, so that its scale can be applied to the product.
    step = columns if basis.bits == 16 else min(columns, basis.columns // basis.scales.shape[1])
    narrow = out.dtype if x.dtype == torch.float32 else x.dtype
    operand = str(target.operand(narrow)).removeprefix("torch.")
    constants |= {"OPERAND": getattr(tl, operand), "TOKENS": tokens, "ROWS": rows, "STEP_COLUMNS": step}
    launch_grid = (triton.cdiv(x.shape[0], tokens), triton.cdiv(basis.codes.shape[0], rows))
    arguments = {"x": x, "codes": basis.codes, "scales": basis.scales, "out": out, "tokens": x.shape[0]}
    return Launch(
        kernel=matmul_kernel,
        launch_grid=launch_grid,
        arguments=arguments,
        constants=constants,
        num_warps=target.blocks.matmul_warps,
    )


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
):
    """out[token, row] for ``ROWS`` rows (axis 0) and one token (axis 1)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    keep_row = row < TOTAL_ROWS
    total = tl.zeros([ROWS, WORDS], tl.float32)
    for first in range(0, ROW_WORDS, WORDS):
        word = first + tl.arange(0, WORDS)
        keep = keep_row[:, None] & (word < ROW_WORDS)[None, :]
        packed = tl.load(codes + row[:, None] * ROW_WORDS + word[None, :], mask=keep, other=0)
        if BITS == 16:
            vector = tl.load(x + token * COLUMNS + word, mask=word < COLUMNS, other=0.0).to(tl.float32)
            total += packed.to(tl.float32) * vector[None, :]
        else:
            # Groups are multiples of 16 columns, so a word never straddles two.
            group = word * (32 // BITS) // GROUP
            scale_at = scales + row[:, None] * (COLUMNS // GROUP) + group[None, :]
            in_columns = (group < COLUMNS // GROUP)[None, :]
            scale = tl.load(scale_at, mask=keep & in_columns, other=0.0).to(tl.float32) * STEP
            total += scale * _word_products(packed, x + token * COLUMNS, word, COLUMNS, BITS)
    tl.store(out + token * TOTAL_ROWS + row, tl.sum(total, 1), mask=keep_row)


@triton.jit
def _word_products(packed, x, word, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Products of the values of each word, in steps, with their part of x, summed per word."""
    unsigned = packed.to(tl.uint32, bitcast=True)
    total = tl.zeros(packed.shape, tl.float32)
    for i in tl.static_range(32 // BITS):
        column = word * (32 // BITS) + i
        vector = tl.load(x + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        code = (unsigned >> (i * BITS)) & (2**BITS - 1)
        total += (code.to(tl.float32) - (2**BITS - 1) / 2) * vector[None, :]
    return total


@triton.jit
def matmul_kernel(
    x,
    codes,
    scales,
    out,
    tokens,
    TOTAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
):
    """A tile of out: ``TOKENS`` tokens (axis 0) by ``ROWS`` rows of the basis (axis 1)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    keep_token, keep_row = token < tokens, row < TOTAL_ROWS
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for first in range(0, COLUMNS, STEP_COLUMNS):
        column = first + tl.arange(0, STEP_COLUMNS)
        keep = keep_token[:, None] & (column < COLUMNS)[None, :]
        left = tl.load(x + token[:, None] * COLUMNS + column[None, :], mask=keep, other=0.0).to(OPERAND)
        if BITS == 16:
            keep = keep_row[:, None] & (column < COLUMNS)[None, :]
            right = tl.load(codes + row[:, None] * ROW_WORDS + column[None, :], mask=keep, other=0.0)
            total = tl.dot(left, tl.trans(right.to(OPERAND)), total, input_precision="ieee")
        else:
            right = _basis_tile(codes + row * ROW_WORDS, first, keep_row, BITS, STEP_COLUMNS)
            scale = tl.load(scales + row * (COLUMNS // GROUP) + first // GROUP, mask=keep_row, other=0.0)
            product = tl.dot(left, tl.trans(right.to(OPERAND)), input_precision="ieee")
            total += product * (scale.to(tl.float32) * STEP)[None, :]
    at = out + token[:, None] * TOTAL_ROWS + row[None, :]
    tl.store(at, total, mask=keep_token[:, None] & keep_row[None, :])


@triton.jit
def _basis_tile(start, first, keep, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Values in steps, ``[rows, COLUMNS]`` from column ``first`` on; exact in bfloat16."""
    word = first // (32 // BITS) + tl.arange(0, COLUMNS * BITS // 32)
    packed = tl.load(start[:, None] + word[None, :], mask=keep[:, None], other=0)
    unsigned = packed.to(tl.uint32, bitcast=True)
    values = ()
    for i in tl.static_range(32 // BITS):
        code = (unsigned >> (i * BITS)) & (2**BITS - 1)
        values = values + (code.to(tl.float32) - (2**BITS - 1) / 2,)
    return tl.reshape(interleaved(values), [start.shape[0], COLUMNS])
