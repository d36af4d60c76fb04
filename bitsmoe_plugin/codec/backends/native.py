"""Rounding and packing in compiled C (``base/native/csrc/rounding*``), on the CPU.

Sums are taken in another order than by the reference, and the search for codes adds up integers, so that a
choice between nearly equal codes may differ.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from bitsmoe_plugin.base.native import library, pointer
from bitsmoe_plugin.codec import row_codec, trellis, uniform
from bitsmoe_plugin.codec.backends.interface import CoupledBlocks, RankRows
from bitsmoe_plugin.codec.backends.reference import ReferenceBackend
from bitsmoe_plugin.codec.block import BLOCK

_MOST_BITS = 16
_MOST_TRELLIS_BITS = 4


class _Grids(ctypes.Structure):
    _fields_ = (("step", c_float * (_MOST_BITS + 1)), ("table", c_void_p * (_MOST_TRELLIS_BITS + 1)))


class _RankRows(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("problems", "units", "rank", "first", "last")),
        *((name, c_int32) for name in ("size", "padded", "experts")),
        *((name, c_void_p) for name in ("weights", "unit", "bits", "start", "low", "step")),
        *((name, c_void_p) for name in ("work", "target", "scale_codes", "codes", "values", "errors")),
    )


@cache
def _library() -> ctypes.CDLL:
    """The library; only asked for where there is one."""
    lib = library()
    assert lib is not None
    address, grids, size = c_void_p, POINTER(_Grids), c_int64
    lib.bitsmoe_trellis_codes.argtypes = [address, address, size, address, c_int, address, c_int]
    lib.bitsmoe_coupled_codes.argtypes = [
        *(address, address, size, address, address),
        *(address, c_int, address, c_int),
    ]
    lib.bitsmoe_pack.argtypes, lib.bitsmoe_pack.restype = [address, size, c_int, address, c_int], None
    lib.bitsmoe_best_scales.argtypes = [grids, address, address, size, size, c_int, *[address] * 3, c_int]
    lib.bitsmoe_best_scales.restype = None
    lib.bitsmoe_choose_scales.argtypes = [
        *(grids, address, address, size, size, c_int),
        *[address] * 4,
        *(size, address, c_int),
    ]
    lib.bitsmoe_choose_scales.restype = None
    lib.bitsmoe_rounded_rows.argtypes = [
        *(grids, address, address, address, address, size, size, c_int),
        *[address] * 4,
        c_int,
    ]
    lib.bitsmoe_round_rank.argtypes = [grids, POINTER(_RankRows), c_int]
    lib.bitsmoe_rank_rows_bytes.restype = c_int64
    built_from = lib.bitsmoe_rank_rows_bytes()  # other sources, if the package was not installed since
    assert built_from == ctypes.sizeof(_RankRows), "codec/backends/native.py and csrc/rounding.c disagree"
    return lib


def available(*tensors: Tensor) -> bool:
    """Whether there is a compiled library, and the tensors are what it reads: real ones in float32."""
    return library() is not None and all(
        t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors
    )


def _grids(grid: str) -> _Grids:
    """Steps and, for rows that are trellis-coded, tables; of a grid of ``row_codec.GRIDS``."""
    grids = _Grids()
    for bits, step in uniform.STEP.items():
        grids.step[bits] = step
    for bits in trellis.WIDTHS:
        if row_codec.uses_trellis(bits, grid):
            grids.table[bits] = pointer(trellis.table(bits))
    return grids


def per_row(weights: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """Weights ``[m, n]`` of rows ``[..., n]``, and how many rows in succession share one of them."""
    if weights.dim() == rows.dim() and weights.shape == (*rows.shape[:-2], 1, rows.shape[-1]):
        return weights.reshape(-1, rows.shape[-1]).contiguous(), rows.shape[-2]
    return weights.expand_as(rows).reshape(-1, rows.shape[-1]).contiguous(), 1


def _rounded(
    rows: Tensor,
    scales: Tensor,
    weights: Tensor,
    bits: Tensor,
    grid: str,
    coupling: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``RoundingBackend.rounded``, or with unit and variance ``rounded_coupled``."""
    widths, scales = bits.to(torch.uint8).contiguous(), scales.contiguous()
    weights, per = per_row(weights, rows)
    rows, size = rows.contiguous(), rows.shape[-1]
    codes = torch.empty(*rows.shape[:-1], row_codec.padded(size), dtype=torch.int32, device="cpu")
    values = torch.empty_like(rows)
    unit, variance = (None, None) if coupling is None else map(pointer, coupling)
    if _library().bitsmoe_rounded_rows(
        *(_grids(grid), pointer(rows), pointer(weights), unit, variance, per, widths.numel(), size),
        *(pointer(widths), pointer(scales), pointer(codes), pointer(values), torch.get_num_threads()),
    ):
        raise MemoryError("no memory for rounding")
    return codes, values


class CompiledBackend(ReferenceBackend):
    """See ``RoundingBackend``."""

    def trellis_codes(self, values: Tensor, rows: Tensor, weights: Tensor, bits: int) -> Tensor:
        blocks, weights = rows.contiguous(), weights.contiguous()
        codes = torch.empty(rows.shape, dtype=torch.int32, device="cpu")
        count = rows.numel() // BLOCK
        threads = torch.get_num_threads()
        if _library().bitsmoe_trellis_codes(
            pointer(blocks), pointer(weights), count, pointer(values), bits, pointer(codes), threads
        ):
            raise MemoryError("no memory for the trellis search")
        return codes

    def coupled_codes(self, values: Tensor, blocks: CoupledBlocks, bits: int) -> Tensor:
        rows, owner = blocks.rows.contiguous(), blocks.owner.contiguous()
        unit, variance = blocks.unit.contiguous(), blocks.variance.contiguous()
        codes = blocks.codes.clone(memory_format=torch.contiguous_format)
        if _library().bitsmoe_coupled_codes(
            *(pointer(rows), pointer(owner), len(rows), pointer(unit), pointer(variance)),
            *(pointer(values), bits, pointer(codes), torch.get_num_threads()),
        ):
            raise MemoryError("no memory for the trellis search")
        return codes

    def best_scales(self, rows: Tensor, weights: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor]:
        widths = torch.as_tensor(bits, dtype=torch.uint8, device="cpu").expand(rows.shape[:-1]).contiguous()
        weights, per = per_row(weights, rows)
        rows = rows.contiguous()
        scales, distortions = rows.new_empty(rows.shape[:-1]), rows.new_empty(rows.shape[:-1])
        _library().bitsmoe_best_scales(
            *(_grids("uniform"), pointer(rows), pointer(weights), per, widths.numel(), rows.shape[-1]),
            *(pointer(widths), pointer(scales), pointer(distortions), torch.get_num_threads()),
        )
        return scales, distortions

    def choose_scales(
        self, rows: Tensor, weights: Tensor, bits: Tensor, start: Tensor, low: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        widths = bits.to(torch.uint8).contiguous()
        weights, per = per_row(weights, rows)
        rows, start = rows.contiguous(), start.contiguous()
        lows, steps = low.expand_as(start).contiguous(), step.expand_as(start).contiguous()
        codes = torch.empty_like(widths)
        _library().bitsmoe_choose_scales(
            *(_grids("uniform"), pointer(rows), pointer(weights), per, widths.numel(), rows.shape[-1]),
            *(pointer(widths), pointer(start), pointer(lows), pointer(steps), widths.numel()),
            *(pointer(codes), torch.get_num_threads()),
        )
        return codes, torch.exp2(low + codes * step)

    def rounded(
        self, rows: Tensor, scales: Tensor, weights: Tensor, bits: Tensor, grid: str
    ) -> tuple[Tensor, Tensor]:
        return _rounded(rows, scales, weights, bits, grid)

    def rounded_coupled(
        self,
        rows: Tensor,
        scales: Tensor,
        weights: Tensor,
        unit: Tensor,
        variance: Tensor,
        bits: Tensor,
        grid: str,
    ) -> tuple[Tensor, Tensor]:
        return _rounded(rows, scales, weights, bits, grid, (unit.contiguous(), variance.contiguous()))

    def round_rank(self, rows: RankRows, first: int, last: int, target: Tensor, grid: str) -> None:
        rank, size = rows.work.shape[-2:]
        floats = (rows.work, target, rows.weights, rows.low, rows.step, rows.values, rows.errors)
        # What was computed before could be of another dtype, in autocast: memory would be read past its end.
        assert all(tensor.dtype == torch.float32 for tensor in floats)
        units = 1 if rows.unit is None else rows.unit.numel() // rank**2
        given = _RankRows(
            *(rows.bits.numel() // rank, units, rank, first, last),
            *(size, rows.codes.shape[-1], rows.bits.shape[1]),
            *(pointer(rows.weights), None if rows.unit is None else pointer(rows.unit)),
            *(pointer(tensor) for tensor in (rows.bits, rows.start, rows.low, rows.step)),
            *(pointer(tensor) for tensor in (rows.work, target, rows.scale_codes)),
            *(pointer(tensor) for tensor in (rows.codes, rows.values, rows.errors)),
        )
        grids, threads = _grids(grid), torch.get_num_threads()
        if _library().bitsmoe_round_rank(ctypes.byref(grids), ctypes.byref(given), threads):
            raise MemoryError("no memory for rounding")

    def pack_codes(self, codes: Tensor, bits: int) -> Tensor:
        words = torch.empty(codes.shape[0], codes.shape[1] // BLOCK * bits, dtype=torch.int32, device="cpu")
        codes, threads = codes.to(torch.int32).contiguous(), torch.get_num_threads()
        _library().bitsmoe_pack(pointer(codes), codes.numel() // BLOCK, bits, pointer(words), threads)
        return words


COMPILED = CompiledBackend()
