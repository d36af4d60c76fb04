"""Products of many tokens with a basis of 4, 8 or 16 bits, which is expanded and multiplied by torch.

In float32, which torch may be told to multiply in fewer bits, by a kernel of tensor cores instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.codec.row_codec import TILED
from bitsmoe_plugin.codec.uniform import STEP
from bitsmoe_plugin.runtime.triton.rows import interleaved, triton_dtype
from bitsmoe_plugin.runtime.triton.target import Target


@dataclass(frozen=True)
class PackedBasis:
    """A stored basis, see ``layout``.

    Attributes:
        codes: ``[rows, words]`` int32, or ``[rows, columns]`` float16 if ``bits`` is 16.
        scales: ``[rows, columns / group_size]`` float16 (empty if ``bits`` is 16).
        bits: 4, 8 or 16.
        columns: values per row.
        tiled: whether codes are on the grid "tiled".
    """

    codes: Tensor
    scales: Tensor
    bits: int
    columns: int
    tiled: bool

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, bits: int, columns: int, grid: str) -> PackedBasis:
        """From the stored tensors, whose float16 values are held as int16; ``grid`` is that of the rows."""
        dense = codes.view(torch.float16) if bits == 16 else codes
        halves = scales.view(torch.float16).contiguous()
        return cls(dense.contiguous(), halves, bits, columns, grid == TILED)

    def constants(self) -> dict[str, object]:
        """What all kernels are compiled for; a step of 0 stands for the grid "tiled"."""
        group = 1 if self.bits == 16 else self.columns // self.scales.shape[1]
        return {
            "TOTAL_ROWS": self.codes.shape[0],
            "COLUMNS": self.columns,
            "ROW_WORDS": self.codes.shape[1],
            "GROUP": group,
            "BITS": self.bits,
            "STEP": 0.0 if self.tiled else STEP[self.bits],
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
    operand = target.operand(dtype if x.dtype == torch.float32 else x.dtype)
    # torch may multiply float32 in fewer bits, see torch.set_float32_matmul_precision.
    exact = operand.itemsize == 2 or x.device.type == "cpu"
    if exact and x.shape[0] >= target.blocks.expanded_tokens:
        return _library_product(x.to(operand), expand(basis, operand, x.device, launch), dtype)
    out = x.new_empty((x.shape[0], basis.codes.shape[0]), dtype=dtype)
    launch(_matmul(x, basis, out, operand, target))
    return out


def expand(basis: PackedBasis, dtype: torch.dtype, device: torch.device, launch: Launcher) -> Tensor:
    """``[rows, columns]`` of ``dtype``: the values of a basis."""
    rows, words = len(basis.codes), basis.codes.shape[1]
    out = torch.empty(rows, basis.columns, dtype=dtype, device=device)
    constants = basis.constants() | {"ROWS": 4, "WORDS": 1024 if basis.bits == 16 else 128}
    arguments = {"codes": basis.codes, "scales": basis.scales, "out": out}
    grid = (triton.cdiv(rows, 4), triton.cdiv(words, constants["WORDS"]))
    launch(
        Launch(
            kernel=expand_kernel,
            launch_grid=grid,
            arguments=arguments,
            constants=constants,
            num_warps=4,
        )
    )
    return out


def _library_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T`` as ``dtype``; where torch can, without a rounding in between."""
    if x.device.type == "cuda" and x.dtype != dtype and not torch.version.hip:
        return torch.mm(x, weight.T, out_dtype=dtype)
    return torch.mm(x, weight.T).to(dtype)


def _matmul(x: Tensor, basis: PackedBasis, out: Tensor, operand: torch.dtype, target: Target) -> Launch:
    tokens, rows, columns = target.blocks.matmul
    tokens = min(tokens, max(16, triton.next_power_of_2(x.shape[0])))
    constants = basis.constants()
    # A step lies within one group, so that its scale can be applied to the product.
    step = columns if basis.bits == 16 else min(columns, basis.columns // basis.scales.shape[1])
    constants |= {"OPERAND": triton_dtype(operand), "TOKENS": tokens, "ROWS": rows, "STEP_COLUMNS": step}
    grid = (triton.cdiv(x.shape[0], tokens), triton.cdiv(basis.codes.shape[0], rows))
    arguments = {"x": x, "codes": basis.codes, "scales": basis.scales, "out": out, "tokens": x.shape[0]}
    return Launch(
        kernel=matmul_kernel,
        launch_grid=grid,
        arguments=arguments,
        constants=constants,
        num_warps=target.blocks.matmul_warps,
    )


@triton.jit
def basis_value(code, scale, BITS: tl.constexpr, STEP: tl.constexpr):
    """Values of codes, float32."""
    if STEP == 0:
        return ((code.to(tl.float32) - 2 ** (BITS - 1)) * scale).to(tl.float16).to(tl.float32)
    else:
        return (code.to(tl.float32) - (2**BITS - 1) / 2) * (scale * STEP)


@triton.jit
def expand_kernel(
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
    """``expand`` of ``ROWS`` rows (axis 0) and ``WORDS`` words of each (axis 1)."""
    EACH: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * WORDS
    word = first + tl.arange(0, WORDS)
    keep_row = (row < TOTAL_ROWS)[:, None]
    at = codes + row[:, None] * ROW_WORDS + word[None, :]
    packed = tl.load(at, mask=keep_row & (word < ROW_WORDS)[None, :], other=0)
    column = first * EACH + tl.arange(0, WORDS * EACH)
    keep = keep_row & (column < COLUMNS)[None, :]
    if BITS == 16:
        values = packed.to(tl.float32)
    else:
        group = word * EACH // GROUP
        at = scales + row[:, None] * (COLUMNS // GROUP) + group[None, :]
        inside = keep_row & (group < COLUMNS // GROUP)[None, :]
        scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        unsigned = packed.to(tl.uint32, bitcast=True)
        pieces = ()
        for i in tl.static_range(EACH):
            code = (unsigned >> (i * BITS)) & (2**BITS - 1)
            pieces = pieces + (basis_value(code, scale, BITS, STEP),)
        values = tl.reshape(interleaved(pieces), [ROWS, WORDS * EACH])
    tl.store(out + row[:, None] * COLUMNS + column[None, :], values, mask=keep)


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
            scale = tl.load(scales + row * (COLUMNS // GROUP) + first // GROUP, mask=keep_row, other=0.0)
            scale = scale.to(tl.float32)
            if STEP == 0:  # products of codes and scales are rounded
                right = _basis_tile(codes + row * ROW_WORDS, first, keep_row, scale, BITS, 0.0, STEP_COLUMNS)
                total = tl.dot(left, tl.trans(right.to(OPERAND)), total, input_precision="ieee")
            else:
                right = _basis_tile(codes + row * ROW_WORDS, first, keep_row, 1.0, BITS, 1.0, STEP_COLUMNS)
                product = tl.dot(left, tl.trans(right.to(OPERAND)), input_precision="ieee")
                total += product * (scale * STEP)[None, :]
    at = out + token[:, None] * TOTAL_ROWS + row[None, :]
    tl.store(at, total, mask=keep_token[:, None] & keep_row[None, :])


@triton.jit
def _basis_tile(start, first, keep, scale, BITS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """Values, ``[rows, COLUMNS]`` from column ``first`` on.

    ``scale`` ``[rows]``, or 1 for values in steps, which are exact in bfloat16.
    """
    word = first // (32 // BITS) + tl.arange(0, COLUMNS * BITS // 32)
    packed = tl.load(start[:, None] + word[None, :], mask=keep[:, None], other=0)
    unsigned = packed.to(tl.uint32, bitcast=True)
    values = ()
    for i in tl.static_range(32 // BITS):
        code = (unsigned >> (i * BITS)) & (2**BITS - 1)
        each = scale[:, None] if STEP == 0 else scale
        values = values + (basis_value(code, each, BITS, STEP),)
    return tl.reshape(interleaved(values), [start.shape[0], COLUMNS])
