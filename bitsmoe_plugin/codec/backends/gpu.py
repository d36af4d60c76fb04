"""Rounding and packing on a GPU (``triton_kernels``). Triton's interpreter takes tensors on the CPU."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitsmoe_plugin.codec import row_codec, trellis, uniform
from bitsmoe_plugin.codec.backends.native import per_row
from bitsmoe_plugin.codec.backends.reference import ReferenceBackend
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.scale_grid import NEARBY, SCALE_LEVELS

if TYPE_CHECKING:
    from bitsmoe_plugin.base.triton_launch import Launcher

_BLOCKS, _COLUMNS = 1, 1024
"""Blocks per program, and values of a row that are priced at once. A search has 256 windows per block to look
at, which is enough for a warp; a program of one warp has no other to wait for."""
_INTERPRETED_BLOCKS = 32


@cache
def has_triton() -> bool:
    """Whether there is what compiles the kernels."""
    return find_spec("triton") is not None


def available(*tensors: Tensor) -> bool:
    """Whether the tensors are on a GPU that Triton compiles for."""
    return all(tensor.device.type == "cuda" for tensor in tensors) and has_triton()


def _launch(
    kernel: str,
    launch_grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    warps: int,
    launch: Launcher | None,
) -> None:
    """Launch a kernel, by default on the current stream. Triton is imported only here."""
    from bitsmoe_plugin.base.triton_launch import Launch, run
    from bitsmoe_plugin.codec.backends import triton_kernels

    entry = Launch(
        kernel=getattr(triton_kernels, kernel),
        launch_grid=launch_grid,
        arguments=arguments,
        constants=constants,
        num_warps=warps,
    )
    (launch or run)(entry)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values of the trellises' windows ``[4, 256]``, and the uniform grids' steps ``[17]``."""
    values = torch.stack([trellis.table(bits) for bits in trellis.WIDTHS])
    return values.to(device), uniform.steps(device)


def _programs(blocks: int, on_gpu: bool) -> tuple[int, int]:
    """Blocks per program, and programs per row; in the interpreter, time goes by programs."""
    wanted = _BLOCKS if on_gpu else _INTERPRETED_BLOCKS
    per = min(wanted, 1 << (blocks - 1).bit_length())
    return per, -(-blocks // per)


def _bytes(widths: Tensor) -> Tensor:
    """Always of one dtype, because kernels are compiled for each."""
    return widths.to(torch.uint8).contiguous()


def round_into(
    rows: Tensor,
    scales: Tensor,
    weights: Tensor,
    per: int,
    widths: Tensor,
    codes: Tensor,
    values: Tensor,
    grid: str,
    launch: Launcher | None = None,
    on_gpu: bool | None = None,
) -> None:
    """Codes and values of rows, each at its own width.

    Args:
        rows: ``[n, I]`` float32; rows of it, of ``codes`` and ``values`` may lie apart.
        scales: ``[n]`` float32.
        weights: ``[n / per, I]`` float32, contiguous: ``per`` rows in succession share one.
        widths: ``[n]`` uint8 or int64.
        codes: ``[n, padded(I)]`` int32, to be filled.
        values: ``[n, I]`` float32, to be filled.
        on_gpu: whether it is compiled; default: if ``rows`` are on a GPU.
    """
    count, size = rows.shape
    if not count or not size:
        return
    assert rows.stride(1) == codes.stride(1) == values.stride(1) == 1
    assert weights.is_contiguous()
    tables, steps = _tables(rows.device)
    compiled = rows.device.type == "cuda" if on_gpu is None else on_gpu
    blocks, programs = _programs(-(-size // BLOCK), compiled)
    tensors = {"rows": rows, "scales": scales.contiguous(), "weights": weights, "widths": _bytes(widths)}
    sizes = {
        "size": size,
        "row_stride": rows.stride(0),
        "code_stride": codes.stride(0),
        "value_stride": values.stride(0),
        "rows_per_weights": per,
    }
    tensors |= {"tables": tables, "steps": steps, "codes": codes, "values": values}
    constants = {"BLOCKS": blocks, "TRELLIS": grid == "trellis"}
    _launch("round_kernel", (count, programs), {**tensors, **sizes}, constants, 1, launch)


class TritonBackend(ReferenceBackend):
    """See ``RoundingBackend``. Nothing waits for the device, but ``pack``, once."""

    values_together = 2**26
    """A few launches serve them all."""

    def rounded(
        self, rows: Tensor, scales: Tensor, weights: Tensor, bits: Tensor, grid: str
    ) -> tuple[Tensor, Tensor]:
        size = rows.shape[-1]
        shared, per = per_row(weights, rows)
        flat = rows.reshape(-1, size)
        codes = torch.empty(*rows.shape[:-1], row_codec.padded(size), dtype=torch.int32, device=rows.device)
        values = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        out = codes.view(len(flat), -1), values.view(flat.shape)
        round_into(flat, scales.reshape(-1), shared, per, bits.reshape(-1), *out, grid)
        return codes, values

    def choose_scales(
        self,
        rows: Tensor,
        weights: Tensor,
        bits: Tensor,
        start: Tensor,
        low: Tensor,
        step: Tensor,
        launch: Launcher | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``launch``: instead of a launch on the current stream."""
        size = rows.shape[-1]
        shared, per = per_row(weights, rows)
        flat = rows.reshape(-1, size)
        codes = torch.empty(start.shape, dtype=torch.uint8, device=rows.device)
        scales = torch.empty(start.shape, dtype=torch.float32, device=rows.device)
        tensors: dict[str, Any] = {"rows": flat, "weights": shared, "widths": _bytes(bits)}
        tensors |= {"start": start.contiguous(), "low": low.expand_as(start).contiguous()}
        tensors |= {"step": step.expand_as(start).contiguous(), "steps": uniform.steps(rows.device)}
        tensors |= {"scale_codes": codes, "scales": scales}
        sizes = {"size": size, "row_stride": flat.stride(0), "rows_per_weights": per}
        columns = min(_COLUMNS, max(32, 1 << (size - 1).bit_length()))
        constants = {"NEARBY": NEARBY, "LEVELS": SCALE_LEVELS, "COLUMNS": columns}
        _launch("choose_kernel", (len(flat),), {**tensors, **sizes}, constants, 4, launch)
        return codes, scales

    def _add_product(self, total: Tensor, share: Tensor, row: Tensor) -> None:
        total.addcmul_(share, row)

    def pack(
        self, codes: Tensor, bits: Tensor, launch: Launcher | None = None, on_gpu: bool | None = None
    ) -> list[Tensor]:
        """``launch``: instead of a launch on the current stream; ``on_gpu``: see ``round_into``."""
        experts, _, size = codes.shape
        order = torch.argsort(-bits, dim=-1, stable=True)
        words = bits * (size // BLOCK)
        ends = words.gather(1, order).flatten().cumsum(0)
        starts = torch.empty_like(words)
        starts.scatter_(1, order, (ends - words.gather(1, order).flatten()).view_as(words))
        own = words.sum(1).tolist()
        payload = torch.empty(sum(own), dtype=torch.int32, device=codes.device)
        if sum(own):
            compiled = codes.device.type == "cuda" if on_gpu is None else on_gpu
            blocks, programs = _programs(size // BLOCK, compiled)
            flat = codes.reshape(-1, size)
            arguments = {
                "codes": flat,
                "widths": _bytes(bits),
                "starts": starts.flatten(),
                "payload": payload,
            }
            launch_grid = (experts * bits.shape[1], programs)
            _launch("pack_kernel", launch_grid, {**arguments, "size": size}, {"BLOCKS": blocks}, 1, launch)
        return list(payload.cpu().split(own))


TRITON = TritonBackend()
