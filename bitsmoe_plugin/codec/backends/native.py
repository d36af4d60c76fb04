"""Rounding and packing in compiled C (``base/native/csrc/rounding*``): the fast paths of four modules.

Each function does what the function that calls it defines (in ``uniform``, ``trellis.search``,
``feedback_rounding`` or ``layout``), which stays as the reference and is used without the compiled library.
Sums are taken in another order, so that a choice between nearly equal codes may differ.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from bitsmoe_plugin.base.native import library, pointer

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
    lib.bitsmoe_pack.argtypes, lib.bitsmoe_pack.restype = [address, size, c_int, address, c_int], None
    lib.bitsmoe_best_scales.argtypes = [grids, address, address, size, size, c_int, *[address] * 3, c_int]
    lib.bitsmoe_best_scales.restype = None
    lib.bitsmoe_choose_scales.argtypes = [
        *(grids, address, address, size, size, c_int),
        *[address] * 4,
        *(size, address, c_int),
    ]
    lib.bitsmoe_choose_scales.restype = None
    lib.bitsmoe_round_rank.argtypes = [grids, POINTER(_RankRows), c_int]
    lib.bitsmoe_rank_rows_bytes.restype = c_int64
    built_from = lib.bitsmoe_rank_rows_bytes()  # other sources, if the package was not installed since
    assert built_from == ctypes.sizeof(_RankRows), "fast_rounding.py and csrc/rounding.c disagree"
    return lib


def available(*tensors: Tensor) -> bool:
    """Whether there is a compiled library, and the tensors are what it reads."""
    return library() is not None and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def _grids(steps: dict[int, float], tables: dict[int, Tensor]) -> _Grids:
    grids = _Grids()
    for bits, step in steps.items():
        grids.step[bits] = step
    for bits, table in tables.items():
        grids.table[bits] = pointer(table)
    return grids


def per_row(weights: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """Weights ``[m, n]`` of rows ``[..., n]``, and how many rows in succession share one of them."""
    if weights.dim() == rows.dim() and weights.shape == (*rows.shape[:-2], 1, rows.shape[-1]):
        return weights.reshape(-1, rows.shape[-1]).contiguous(), rows.shape[-2]
    return weights.expand_as(rows).reshape(-1, rows.shape[-1]).contiguous(), 1


def trellis_codes(table: Tensor, rows: Tensor, weights: Tensor, bits: int) -> Tensor:
    """See ``trellis.search.search``."""
    blocks, weights = rows.contiguous(), weights.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int32)
    count = rows.numel() // 32
    threads = torch.get_num_threads()
    if _library().bitsmoe_trellis_codes(
        pointer(blocks), pointer(weights), count, pointer(table), bits, pointer(codes), threads
    ):
        raise MemoryError("no memory for the trellis search")
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """See ``bit_strings.pack_codes``; codes ``[rows, n]`` int32, whole blocks."""
    words = torch.empty(codes.shape[0], codes.shape[1] // 32 * bits, dtype=torch.int32)
    codes, threads = codes.contiguous(), torch.get_num_threads()
    _library().bitsmoe_pack(pointer(codes), codes.numel() // 32, bits, pointer(words), threads)
    return words


def best_scales(
    rows: Tensor, weights: Tensor, bits: Tensor | int, steps: dict[int, float]
) -> tuple[Tensor, Tensor]:
    """See ``uniform.best_scale``, here with a width per row.

    Args:
        bits: ``[...]``, or one for all.

    Returns:
        scales and distortions, both ``[...]`` float32.
    """
    widths = torch.as_tensor(bits, dtype=torch.uint8).expand(rows.shape[:-1]).contiguous()
    weights, per = per_row(weights, rows)
    rows = rows.contiguous()
    scales, distortions = rows.new_empty(rows.shape[:-1]), rows.new_empty(rows.shape[:-1])
    _library().bitsmoe_best_scales(
        *(_grids(steps, {}), pointer(rows), pointer(weights), per, widths.numel(), rows.shape[-1]),
        *(pointer(widths), pointer(scales), pointer(distortions), torch.get_num_threads()),
    )
    return scales, distortions


def choose_scales(
    rows: Tensor,
    weights: Tensor,
    bits: Tensor,
    start: Tensor,
    low: Tensor,
    step: Tensor,
    steps: dict[int, float],
) -> Tensor:
    """Scale codes ``[..., r]`` uint8 of rows ``[..., r, n]``, see ``feedback_rounding``.

    Args:
        low, step: ``[r]``.
    """
    widths = bits.to(torch.uint8).contiguous()
    weights, per = per_row(weights, rows)
    rows, start, low, step = (tensor.contiguous() for tensor in (rows, start, low, step))
    codes = torch.empty_like(widths)
    _library().bitsmoe_choose_scales(
        *(_grids(steps, {}), pointer(rows), pointer(weights), per, widths.numel(), rows.shape[-1]),
        *(pointer(widths), pointer(start), pointer(low), pointer(step), len(low)),
        *(pointer(codes), torch.get_num_threads()),
    )
    return codes


def round_rank(
    first: int,
    last: int,
    *,
    work: Tensor,
    target: Tensor,
    bits: Tensor,
    unit: Tensor | None,
    weights: Tensor,
    start: Tensor,
    low: Tensor,
    step: Tensor,
    scale_codes: Tensor,
    codes: Tensor,
    values: Tensor,
    errors: Tensor,
    steps: dict[int, float],
    tables: dict[int, Tensor],
) -> None:
    """Rows ``first`` to ``last`` of ``feedback_rounding.round_along_rank``; the tensors are those of its
    loop."""
    rank, size = work.shape[-2:]
    # What was computed before could be of another dtype, in autocast: memory would be read past its end.
    assert all(tensor.dtype == torch.float32 for tensor in (work, target, weights, low, step, values, errors))
    rows = _RankRows(
        *(bits.numel() // rank, 1 if unit is None else unit.numel() // rank**2, rank, first, last),
        *(size, codes.shape[-1], bits.shape[1]),
        *(pointer(weights), None if unit is None else pointer(unit)),
        *(pointer(tensor) for tensor in (bits, start, low, step)),
        *(pointer(tensor) for tensor in (work, target, scale_codes, codes, values, errors)),
    )
    grids = _grids(steps, tables)
    if _library().bitsmoe_round_rank(ctypes.byref(grids), ctypes.byref(rows), torch.get_num_threads()):
        raise MemoryError("no memory for rounding")
