"""Forward pass of packed experts on a CPU, in C: packed rows are decoded in registers, chunk by chunk.

C rather than numba: the decoder is a byte permutation, a field extraction and a table lookup of 64 codes
at once (AVX-512 VBMI), which no compiler finds by itself; and vLLM on a CPU cannot start once llvmlite is
loaded. The library is compiled when the package is installed, is called through ctypes and knows nothing
of torch. It shares torch's OpenMP threads.

What a token gets is the same bit by bit whatever tokens are computed with it: sums have one order for all
numbers of tokens, experts in use and threads. That costs nothing, since the fastest kernels have it: integers
of 16 bits are multiplied faster than bfloat16 by oneDNN (4.5 times the products of the bases, one core of
Emerald Rapids without AMX), so no number of tokens is better served by other arithmetic. Where there are
tiles (AMX, ``csrc/tiles.h``) they multiply the same integers, and floats are added up in the same order.

Inputs are rounded to 16-bit integers over short stretches, float32 inputs to two of them (see
``csrc/bitsmoe.h``), everything else is exact or float32: relative to ``runtime.reference_layer`` the output
differs by about 3e-5 before it is rounded to bfloat16 or float16, and by 3e-7 in float32. With the grid
"tiled", products of codes and scales are not rounded to float16, which differs by some 1e-4 more.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_uint8, c_void_p
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bitsmoe_plugin.base.native import library, pointer
from bitsmoe_plugin.codec import layout, row_codec, trellis, uniform
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.gating import ACTIVATIONS, Gating, GatingForm, finite_or_zero
from bitsmoe_plugin.runtime import cpu_blocks

MAX_WIDTHS = 8
SCRATCH = 128 * 2**20
"""Bytes that intermediate results of the tokens that are computed at a time take; more only where one token's
do. The more tokens, the fewer times is a row decoded."""


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("bits", c_int32),
        ("trellis", c_int32),
        ("offset2", c_int32),
        ("step", c_float),
        ("joint", c_void_p),
        ("table", c_uint8 * 256),
        ("perm", c_uint8 * 64),
        ("shift", c_uint8 * 64),
        ("quads", c_uint8 * 512),
    )


_ROWS = ("row_codes", "scale_grid", "payload")
_TILED = ("tile_scales", "row_gains")
_BASES = ("input_basis", "output_basis", "input_scales", "output_scales")


class _GatingForm(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("activation", "clamps_activation")),
        *((name, c_float) for name in ("alpha", "limit", "offset", "gate_cap", "up_cap")),
    )


_UNKNOWN = _GatingForm(activation=-1)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("experts", "hidden", "rank", "size", "inputs", "bases")),
        *((name, c_int32) for name in ("basis_bits", "basis_group", "widths")),
        ("width_bits", c_int32 * MAX_WIDTHS),
        ("falling", c_int32 * MAX_WIDTHS),
        ("decoders", _Decoder * MAX_WIDTHS),
        ("basis", _Decoder),
        *((name, c_void_p) for name in (*_ROWS, "starts", *_BASES, *_TILED, "row_starts", "input_bias")),
        ("bias_dtype", c_int32),
        ("gating", _GatingForm),
    )


@cache
def _library() -> ctypes.CDLL:
    """The library; only asked for where there is one."""
    lib = library()
    assert lib is not None
    lib.bitsmoe_layer_bytes.restype = c_int64
    lib.bitsmoe_prepare_decoder.argtypes = [POINTER(_Decoder)]
    address, layer = c_void_p, POINTER(_Layer)
    lib.bitsmoe_basis.argtypes = [layer, c_int, address, c_int64, address, c_int, c_int]
    lib.bitsmoe_gate_up.argtypes = [layer, address, address, c_int64, c_int64, address, c_int, c_int]
    lib.bitsmoe_down.argtypes = [layer, address, address, address, c_int64, c_int64, address, c_int, c_int]
    assert lib.bitsmoe_layer_bytes() == ctypes.sizeof(_Layer), "cpu.py and csrc/bitsmoe.h disagree"
    return lib


def _decoder(bits: int, grid: str) -> _Decoder:
    """How codes of a width become bytes u, with value = step * (u - offset2 / 2)."""
    decoder = _Decoder(bits=bits)
    if row_codec.uses_trellis(bits, grid):
        decoder.trellis, decoder.offset2, decoder.step = 1, 256, trellis.STEP
        decoder.table = (c_uint8 * 256)(*(trellis.TABLES[bits].astype(np.int16) + 128).tolist())
    elif grid == row_codec.TILED:
        decoder.offset2, decoder.step = (1, 2.0) if bits == 1 else (2**bits, 1.0)
    else:
        decoder.offset2, decoder.step = 2**bits - 1, uniform.STEP[bits]
    if _library().bitsmoe_prepare_decoder(ctypes.byref(decoder)):
        raise MemoryError(f"no memory for the decoder of {bits} bits")
    return decoder


def _gating_form(gating: Gating) -> _GatingForm:
    """Of a gating that the library computes; others are called in Python."""
    if not isinstance(gating, GatingForm):
        return _UNKNOWN
    return _GatingForm(
        activation=ACTIVATIONS.index(gating.activation),
        clamps_activation=gating.clamps_activation,
        alpha=gating.alpha,
        limit=gating.limit,
        offset=gating.offset,
        **{name: finite_or_zero(getattr(gating, name)) for name in ("gate_cap", "up_cap")},
    )


@dataclass(frozen=True)
class CpuLayer:
    """A packed layer or shard, ready to compute; holds no copy of it.

    Attributes:
        spec: sizes.
        packed: the tensors, kept alive for the library.
        starts: ``[2, f, E]`` int64, first payload word and first stored row of every (factor, expert).
        gating: of the experts.
        layer: what the library reads.
    """

    spec: PackedSpec
    packed: PackedExperts
    starts: Tensor
    gating: Gating
    layer: _Layer

    @classmethod
    def prepare(cls, spec: PackedSpec, packed: PackedExperts, gating: Gating) -> CpuLayer:
        """Derive the offsets from the row codes.

        Args:
            packed: contiguous, on the CPU.
        """
        shape, widths = spec.shape, spec.widths
        index = layout.index_rows(packed.row_codes, widths, shape)
        starts = torch.tensor([index.starts, index.row_starts], device="cpu")
        layer = _Layer(
            experts=shape.num_experts,
            hidden=shape.hidden_size,
            rank=shape.rank,
            size=shape.intermediate_size,
            inputs=shape.inputs,
            bases=spec.input_bases,
            basis_bits=spec.basis_bits,
            basis_group=spec.basis_group_size,
            widths=len(widths),
            width_bits=(c_int32 * MAX_WIDTHS)(*widths),
            falling=(c_int32 * MAX_WIDTHS)(*sorted(range(len(widths)), key=lambda i: -widths[i])),
            starts=pointer(starts[0]),
            row_starts=pointer(starts[1]),
            **{name: pointer(getattr(packed, name)) for name in (*_ROWS, *_BASES)},
            **{name: pointer(getattr(packed, name)) for name in _TILED if spec.is_tiled},
            gating=_gating_form(gating),
        )
        if packed.input_bias is not None:
            layer.input_bias = pointer(packed.input_bias)
            layer.bias_dtype = cpu_blocks.STORED_DTYPES[spec.original(packed.input_bias).dtype]
        for i, width in enumerate(widths):
            if width:
                layer.decoders[i] = _decoder(width, spec.grid)
        if spec.basis_bits < 16:
            layer.basis = _decoder(spec.basis_bits, row_codec.TILED if spec.is_tiled else "uniform")
        return cls(spec, packed, starts, gating, layer)

    @torch.no_grad()
    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``dispatch.Runtime``.

        Raises:
            MemoryError: no memory for intermediate results.
        """
        x = hidden.float().contiguous()
        planes = 1 if hidden.dtype in (torch.bfloat16, torch.float16) else 2
        ids, weights = top_k_index.long().contiguous(), top_k_weights.float().contiguous()
        out = torch.empty_like(x)
        tokens = max(1, SCRATCH // self.bytes_per_token(ids.shape[1], planes))
        for start in range(0, len(x), tokens):
            part = slice(start, start + tokens)
            self._forward(x[part], ids[part], weights[part], out[part], planes)
        return out.to(hidden.dtype)

    def bytes_per_token(self, k: int, planes: int) -> int:
        """Of intermediate results, with ``k`` experts per token; whichever experts these are."""
        shape = self.spec.shape
        vectors = 1 if self._knows_gating else 1 + shape.inputs
        pair = 4 * vectors * shape.intermediate_size + 2 * planes * shape.intermediate_size + 4 * shape.rank
        return k * pair + 4 * (self.spec.input_bases + 1 + planes) * shape.rank

    @property
    def _knows_gating(self) -> bool:
        return bool(self.layer.gating.activation != _UNKNOWN.activation)

    def _forward(self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, planes: int) -> None:
        lib, layer = _library(), ctypes.byref(self.layer)
        shape, how = self.spec.shape, (torch.get_num_threads(), planes)
        tokens, k = ids.shape
        z = x.new_empty(tokens, self.spec.input_bases * shape.rank)
        coordinates = x.new_empty(tokens, shape.rank)
        h = x.new_empty(tokens * k, 1 if self._knows_gating else shape.inputs, shape.intermediate_size)
        chosen = pointer(ids)
        failed = lib.bitsmoe_basis(layer, 0, pointer(x), tokens, pointer(z), *how)
        failed |= lib.bitsmoe_gate_up(layer, pointer(z), chosen, tokens, k, pointer(h), *how)
        if not self._knows_gating:
            h = cpu_blocks.gated(self.gating, h)
        failed |= lib.bitsmoe_down(
            layer, pointer(h), pointer(weights), chosen, tokens, k, pointer(coordinates), *how
        )
        failed |= lib.bitsmoe_basis(layer, 1, pointer(coordinates), tokens, pointer(out), *how)
        if failed:
            raise MemoryError(f"no memory for the experts' intermediate results of {tokens} tokens")
