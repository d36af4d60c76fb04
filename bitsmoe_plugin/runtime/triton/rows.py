"""Decoding of packed rows in Triton; the layout is described in ``layout``.

A thread decodes whole blocks of 32 values: it loads the block's words once, and every window or
code is then a shift by a constant. Neighbouring windows overlap, so values are looked up in pairs:
the two windows that end with codes i and i + 1 are 8 + bits consecutive bits of the ring, an index
into a table of 2**(8 + bits) pairs. Pairs, because the four tables then take 2, 4, 8 and 16 KiB;
four values at a time would take 64 KiB at 2 bits. An entry holds two 16-bit values, in which a table
value, an int8 times 2**-5, is exact: as operands of a product they need no arithmetic at all.

Nothing is masked: where there is no row or block, pointers stay on the last one, and whoever reads the
values sees to it that they count for nothing.

Offsets: the first word of an (expert, factor) is 64 bits, what lies within it 32 bits, so one factor
of one expert may have up to 2**31 words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.codec import row_codec, trellis
from bitsmoe_plugin.codec.uniform import STEP
from bitsmoe_plugin.models.gating import GatingForm, finite_or_zero


def pair_tables(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The tables of all trellis widths, ``[512 + 1024 + 2048 + 4096]`` int32, 1 to 4 bits.

    Entry w of a width holds the values of the windows w % 2**8 (low half) and w >> bits (high half), both
    of a 16-bit ``dtype``: the window that ends ``bits`` later has its oldest bits dropped.
    """
    pieces = []
    for bits in trellis.WIDTHS:
        pair = torch.arange(2 ** (trellis.WINDOW + bits), device="cpu")
        values = trellis.table(bits)
        both = torch.stack([values[pair % 2**trellis.WINDOW], values[pair >> bits]], -1)
        pieces.append(both.to(dtype).view(torch.int32).flatten())
    return torch.cat(pieces)


def row_units(widths: tuple[int, ...], grid: str) -> tuple[float, ...]:
    """What decoded values of each width are multiplied by, besides the row's scale.

    Values of a trellis and of the grid "tiled" are decoded as they are; codes of the uniform grid to -1 .. 1,
    whatever their width, so that neither they nor what they are multiplied by leave the range of float16.
    """
    if grid == row_codec.TILED:
        return (1.0,) * len(widths)
    return tuple(
        1.0 if row_codec.uses_trellis(width, grid) else STEP[width] * 2.0 ** (width - 1) for width in widths
    )


@triton.jit
def _ring_field(words, START: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr):
    """``LENGTH`` bits from bit ``START`` (may be negative) of the ring of ``BITS`` words."""
    word: tl.constexpr = (START + 32 * BITS) % (32 * BITS) // 32
    shift: tl.constexpr = (START + 32 * BITS) % 32
    value = words[word] >> shift
    if shift + LENGTH > 32:
        value |= words[(word + 1) % BITS] << (32 - shift)
    if LENGTH < 32:
        value &= 2**LENGTH - 1
    return value


@triton.jit
def interleaved(values):
    """Tensors ``[R, C]``, a power of two of them, as one ``[R, C, 2, .., 2]``, the last axes counting them.

    Reshaped to ``[R, n C]`` they alternate. Joining never moves a value to another thread.
    """
    half: tl.constexpr = len(values) // 2
    if half == 0:
        return values[0]
    else:
        joined = ()
        for i in tl.static_range(half):
            joined = joined + (tl.join(values[i], values[i + half]),)
        return interleaved(joined)


@triton.jit
def load_words(start, BITS: tl.constexpr):
    """The words of the blocks at pointers ``[ROWS, BLOCKS]``, a tuple of ``BITS`` tensors uint32."""
    words = ()
    for i in tl.static_range(BITS):
        words = words + (tl.load(start + i).to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def _whole_number(code, BITS: tl.constexpr):
    """See ``tiled.whole_numbers``; float32."""
    if BITS == 16:
        return code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif BITS == 1:
        return 2 * code.to(tl.float32) - 1
    else:
        return code.to(tl.float32) - 2 ** (BITS - 1)


@triton.jit
def decode_words(words, scale, tables, BITS: tl.constexpr, GRID: tl.constexpr, OPERAND: tl.constexpr):
    """Values of blocks ``[ROWS, BLOCKS]`` as ``[ROWS, 32 * BLOCKS]`` of dtype ``OPERAND``, see ``row_units``.

    ``tables`` are ``pair_tables(float16)`` for float16, of bfloat16 otherwise; ``scale`` is what
    ``row_scales.load_scales`` gives. All values are exact, but in bfloat16 and float16 those of rows of 16
    bits, and in bfloat16 those of the grid "tiled", which are float16.
    """
    ROWS: tl.constexpr = words[0].shape[0]
    BLOCKS: tl.constexpr = words[0].shape[1]
    fields = ()
    if GRID == "trellis" and BITS <= 4:
        for i in tl.static_range(0, 32, 2):
            pair = _ring_field(words, (i + 1) * BITS - 8, 8 + BITS, BITS)
            fields = fields + (pair.to(tl.int32, bitcast=True),)
        index = tl.reshape(interleaved(fields), [ROWS * 16 * BLOCKS])
        # Through shared memory, whose banks serve 32 different words at once; a load looks up lines one by
        # one. Triton keeps the table in registers around a loop and writes it there in each step.
        table = tl.load(tables + 512 * (2 ** (BITS - 1) - 1) + tl.arange(0, 2 ** (8 + BITS)))
        both = tl.reshape(tl.gather(table, index, 0), [ROWS, 16 * BLOCKS])
        if tl.float32 == OPERAND:
            low = (both << 16).to(tl.float32, bitcast=True)
            high = (both & -65536).to(tl.float32, bitcast=True)
        else:
            low = both.to(tl.int16).to(OPERAND, bitcast=True)
            high = (both >> 16).to(tl.int16).to(OPERAND, bitcast=True)
        return tl.reshape(tl.join(low, high), [ROWS, 32 * BLOCKS])
    elif GRID == "tiled":
        for i in tl.static_range(32):
            code = _ring_field(words, i * BITS, BITS, BITS)
            fields = fields + ((_whole_number(code, BITS) * scale).to(tl.float16),)
        return tl.reshape(interleaved(fields), [ROWS, 32 * BLOCKS]).to(OPERAND)
    else:
        for i in tl.static_range(32):
            fields = fields + (_ring_field(words, i * BITS, BITS, BITS),)
        code = tl.reshape(interleaved(fields), [ROWS, 32 * BLOCKS])
        return (code.to(tl.float32) * 2.0 ** (1 - BITS) - (2**BITS - 1) / 2**BITS).to(OPERAND)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Activations as ``GatingForm`` names them."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u)
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2 * u)
    else:
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "relu":
            return positive
        else:
            tl.static_assert(ACTIVATION == "relu2")
            return positive * positive


@triton.jit
def _capped(x, CAP: tl.constexpr):
    """CAP tanh(x / CAP), x itself for CAP = 0; near 0, where 2 sigmoid - 1 would cancel, by Lambert's
    continued fraction, to 1e-7."""
    if CAP == 0:
        return x
    else:
        y = x / CAP
        z = y * y
        near = y * (945 + z * (105 + z)) / (945 + z * (420 + 15 * z))
        return CAP * tl.where(tl.abs(y) < 0.6, near, 2 * tl.sigmoid(2 * y) - 1)


@triton.jit
def gating(gate, up, FORM: tl.constexpr):
    """A ``GatingForm``, see ``form_constants``; of experts without a gate only ``up`` is read."""
    ACTIVATION: tl.constexpr = FORM[0]
    ALPHA: tl.constexpr = FORM[2]
    LIMIT: tl.constexpr = FORM[3]
    if not FORM[1]:
        return _activated(up, ACTIVATION, ALPHA)
    if FORM[6] > 0 or FORM[7] > 0:
        return _capped(gate, FORM[6]) * tl.sigmoid(ALPHA * gate) * _capped(up, FORM[7])
    if LIMIT > 0:
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if not FORM[4]:
            gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    act = _activated(gate, ACTIVATION, ALPHA)
    if LIMIT > 0 and FORM[4]:
        act = tl.minimum(act, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return act * (up + FORM[5])


def form_constants(form: GatingForm) -> tuple[object, ...]:
    """What kernels are compiled for: the fields of a form, with 0 for no limit and no cap."""
    limit, *caps = (finite_or_zero(limit) for limit in (form.limit, form.gate_cap, form.up_cap))
    return form.activation, form.has_gate, form.alpha, limit, form.clamps_activation, form.offset, *caps


@triton.jit
def add_bias(
    value, bias, expert, column, keep, FACTOR: tl.constexpr, INPUTS: tl.constexpr, SIZE: tl.constexpr
):
    """``value`` ``[..., columns]`` plus the bias of a factor of an expert, of ``[E, INPUTS, SIZE]``."""
    at = bias + (expert.to(tl.int64) * INPUTS + FACTOR) * SIZE + column
    return value + tl.load(at, mask=keep, other=0.0).to(tl.float32)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The same of Triton."""
    return getattr(tl, str(dtype).removeprefix("torch."))
