"""The bases of one layer, read from the authors' tensors (see the package's text).

The layout of 8-bit bases is that of vLLM's GPTQ-Marlin kernel: the matrix ``[K, N]`` in tiles of 16 by 64,
whose 1024 bytes are ordered as the lanes of a warp load them, with zero point 128; scales of 128 rows each,
their columns permuted within 64, or within 32 if there is one group of rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.codec import bit_strings, tiled
from bitsmoe_plugin.errors import CheckpointError

NAMES = ("shared_vh_gate_proj", "shared_vh_up_proj", "shared_u_down")
PARTS = ("qweight", "scales")
ZERO = 128
"""Code of zero at 8 bits."""


@dataclass(frozen=True)
class Basis:
    """A basis of ``[rows, columns]``.

    Attributes:
        codes: uint8 ``[rows, columns]``, or the float16 values themselves.
        scales: float16 ``[rows, columns / 128]``, None if the basis is of 16 bits.
    """

    codes: Tensor
    scales: Tensor | None

    @property
    def bits(self) -> int:
        return 16 if self.scales is None else 8

    def stored(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of the packed layout, with zeros to ``[rows, columns]``."""
        fill = (0, columns - self.codes.shape[1], 0, rows - self.codes.shape[0])
        if self.scales is None:
            values = torch.nn.functional.pad(self.codes, fill)
            return values.view(torch.int16), torch.zeros(0, dtype=torch.int16)
        codes = torch.nn.functional.pad(self.codes, fill, value=ZERO)
        groups = (0, columns // tiled.TILE - self.scales.shape[1], 0, fill[3])
        scales = torch.nn.functional.pad(self.scales, groups)
        return bit_strings.pack_codes(codes, 8), scales.contiguous().view(torch.int16)


def read_basis(name: str, tensors: dict[str, Tensor], hidden_size: int, output: bool) -> Basis:
    """Read one basis: ``[r, H]``, or ``[H, r]`` if it is that of down.

    Args:
        name: of the basis, with its path.
        tensors: under the key "" of 16 bits, or ``PARTS``.

    Raises:
        CheckpointError: naming the tensor and what is wrong with it.
    """
    basis = _read_half(name, tensors[""]) if "" in tensors else _read_marlin(name, tensors)
    rank, found = basis.codes.shape[::-1] if output else basis.codes.shape
    if found != hidden_size or not 1 <= rank <= hidden_size:
        shape = f"[{hidden_size}, r]" if output else f"[r, {hidden_size}]"
        raise CheckpointError(
            f"{name} is {list(basis.codes.shape)}; the model asks for {shape}, r at most {hidden_size}"
        )
    values = basis.codes if basis.scales is None else tiled.decode(basis.codes.int(), 8, basis.scales)
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{name} holds values that are not finite")
    return basis


def _read_half(name: str, values: Tensor) -> Basis:
    if values.dtype != torch.float16 or values.dim() != 2:
        raise CheckpointError(f"{name} is {values.dtype} {list(values.shape)}; the format has float16, 2-D")
    return Basis(values, None)


def _read_marlin(name: str, tensors: dict[str, Tensor]) -> Basis:
    words, scales = (tensors[part] for part in PARTS)
    if words.dtype != torch.int32 or scales.dtype != torch.float16 or scales.dim() != 2:
        raise CheckpointError(
            f"{name}_qweight is {words.dtype}, {name}_scales {scales.dtype} {list(scales.shape)}; the format "
            "has int32 and 2-D float16"
        )
    k, n = tiled.TILE * scales.shape[0], scales.shape[1]
    if tuple(words.shape) != (k // 16, 4 * n) or n % 64 or not k * n:
        raise CheckpointError(
            f"{name}_qweight is {list(words.shape)}; scales {list(scales.shape)} ask for {[k // 16, 4 * n]}, "
            "and a multiple of 64 columns"
        )
    place = _byte_places()
    tiles = words.contiguous().view(torch.uint8).view(k // 16, n // 64, 1024)
    codes = tiles[:, :, place.flatten()].view(k // 16, n // 64, 16, 64).permute(0, 2, 1, 3).reshape(k, n)
    columns = _scale_columns(n, one_group=k == tiled.TILE)
    return Basis(codes.T.contiguous(), scales[:, columns].T.contiguous())


def _byte_places() -> Tensor:
    """``[16, 64]`` int64: byte of a tile that holds the value of its row and column."""
    row, column = torch.arange(16)[:, None], torch.arange(64)
    lane = column % 8 * 4 + row % 8 // 2
    value = column % 16 // 8 * 4 + row // 8 * 2 + row % 2
    octet = lane * 32 + column // 16 * 8 + value
    # In a word of four, the second and the third are exchanged.
    return octet // 4 * 4 + torch.tensor([0, 2, 1, 3])[octet % 4]


def _scale_columns(n: int, one_group: bool) -> Tensor:
    """``[n]`` int64: column of the stored scales that holds those of each column."""
    column = torch.arange(n)
    if one_group:
        return column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2
    return column // 64 * 64 + column % 8 * 8 + column % 64 // 8
