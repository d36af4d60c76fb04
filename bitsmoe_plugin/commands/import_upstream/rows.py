"""The rows of one projection of one expert, read from the authors' buffers (see the package's text)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitsmoe_plugin.codec import tiled
from bitsmoe_plugin.errors import CheckpointError

WIDTHS = (1, 2, 3, 4, 6, 8, 16)
STAGE = 16
GROUP = 32
_GROUPS = tiled.TILE // GROUP
_METADATA = (torch.int32, torch.int16)
REQUIRED: dict[str, tuple[torch.dtype, ...]] = {
    "payload_buffer": (torch.uint32,),
    "rank_idx_buffer": (torch.int32,),
    "tile_meta_buffer": _METADATA,
    "slab_meta_buffer": _METADATA,
    "scale_buffer": (torch.float16,),
    "s_buffer": (torch.float16,),
}
IMPLIED: dict[str, tuple[torch.dtype, ...]] = {
    "segments": _METADATA,
    "original_indices": (torch.int32,),
    "groupsize": _METADATA,
    "original_rank": (torch.int32,),
}


@dataclass(frozen=True)
class ProjectionRows:
    """n stored rows in the order of the files.

    Attributes:
        ranks: ``[n]`` int64, distinct: coordinate that the row meets.
        bits: ``[n]`` int64, members of ``WIDTHS``.
        codes: ``[n, I]`` int32, of the grid "tiled".
        scales: ``[n, tiles]`` float16.
        gains: ``[n]`` float16.
    """

    ranks: Tensor
    bits: Tensor
    codes: Tensor
    scales: Tensor
    gains: Tensor


def read_projection(name: str, buffers: dict[str, Tensor], rank: int, size: int) -> ProjectionRows:
    """Read one projection.

    Args:
        name: ``<moe>.experts.<e>.<p>``, for errors.
        buffers: those of ``REQUIRED``, and any of ``IMPLIED``.
        rank: of the basis.
        size: intermediate_size, a multiple of 32.

    Raises:
        CheckpointError: naming the buffer and what it contradicts.
    """
    _check_dtypes(name, buffers)
    slabs = _slabs(name, buffers["slab_meta_buffer"])
    bits = torch.tensor([width for width, rows in slabs for _ in range(rows)], dtype=torch.int64)
    _check_offsets(name, buffers, slabs, size)
    ranks = buffers["rank_idx_buffer"].long()
    _check_ranks(name, ranks, rank)
    _check_implied(name, buffers, bits, rank)
    rows = ProjectionRows(
        ranks, bits, *_read_slabs(buffers["payload_buffer"], buffers["scale_buffer"], slabs, size),
        buffers["s_buffer"],
    )  # fmt: skip
    _check_values(name, rows)
    return rows


def _check_dtypes(name: str, buffers: dict[str, Tensor]) -> None:
    known = {**REQUIRED, **IMPLIED}
    for buffer, tensor in buffers.items():
        if tensor.dtype not in known[buffer]:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in known[buffer])
            raise CheckpointError(f"{name}_{buffer} is {tensor.dtype}; the format has {allowed}")


def _slabs(name: str, meta: Tensor) -> list[tuple[int, int]]:
    """(width, rows) of each slab."""
    if meta.numel() and (meta.dim() != 2 or meta.shape[1] != 4):
        raise CheckpointError(f"{name}_slab_meta_buffer is {tuple(meta.shape)}; the format has [slabs, 4]")
    slabs = [(width, rows) for width, rows, _, _ in meta.tolist()] if meta.numel() else []
    for width, rows in slabs:
        if width not in WIDTHS or rows < 1:
            raise CheckpointError(
                f"{name}_slab_meta_buffer has a slab of {rows} rows of {width} bits; the format has {WIDTHS}"
            )
    return slabs


def _check_offsets(name: str, buffers: dict[str, Tensor], slabs: list[tuple[int, int]], size: int) -> None:
    """All sizes and offsets follow from the slabs."""
    tiles, row, word, scale = tiled.tiles(size), 0, 0, 0
    slab_meta: list[list[int]] = []
    tile_meta: list[list[int]] = []
    for width, rows in slabs:
        slab_meta.append([width, rows, row, len(tile_meta)])
        for tile in range(tiles):
            tile_meta.append([word, scale, min(tiled.TILE, size - tile * tiled.TILE)])
            word, scale = word + rows * _GROUPS * width, scale + rows
        row += rows
    for buffer, wanted in (("slab_meta_buffer", slab_meta), ("tile_meta_buffer", tile_meta)):
        found = buffers[buffer].tolist() if buffers[buffer].numel() else []
        if found != wanted:
            raise CheckpointError(
                f"{name}_{buffer} does not describe slabs of {[rows for _, rows in slabs]} rows, "
                f"intermediate_size {size}, that follow each other"
            )
    lengths = {"payload_buffer": word, "scale_buffer": scale, "rank_idx_buffer": row, "s_buffer": row}
    for buffer, length in lengths.items():
        if tuple(buffers[buffer].shape) != (length,):
            raise CheckpointError(
                f"{name}_{buffer} is {list(buffers[buffer].shape)}; its slabs ask for [{length}]"
            )


def _check_ranks(name: str, ranks: Tensor, rank: int) -> None:
    if ranks.numel() and not 0 <= int(ranks.min()) <= int(ranks.max()) < rank:
        raise CheckpointError(
            f"{name}_rank_idx_buffer holds {int(ranks.min())} to {int(ranks.max())}; the basis has rank "
            f"{rank}"
        )
    if len(torch.unique(ranks)) != len(ranks):
        raise CheckpointError(f"{name}_rank_idx_buffer names a row twice")


def _check_implied(name: str, buffers: dict[str, Tensor], bits: Tensor, rank: int) -> None:
    """What the other buffers imply must not be contradicted."""
    widths, counts = torch.unique_consecutive(bits, return_counts=True)
    ends = counts.cumsum(0)
    implied = {
        "segments": torch.stack([widths, ends - counts, ends], 1),
        "original_indices": buffers["rank_idx_buffer"],
        "groupsize": torch.tensor([tiled.TILE]),
    }
    for buffer, wanted in implied.items():
        if buffer in buffers and buffers[buffer].flatten().tolist() != wanted.flatten().tolist():
            raise CheckpointError(f"{name}_{buffer} contradicts the other buffers")
    if "original_rank" in buffers:
        found = buffers["original_rank"].flatten().tolist()
        least = int(buffers["rank_idx_buffer"].max()) + 1 if len(bits) else 0
        if len(found) != 1 or not least <= found[0] <= rank:
            raise CheckpointError(
                f"{name}_original_rank is {found}; rows and basis ask for {least} to {rank}"
            )


def _read_slabs(
    payload: Tensor, scale: Tensor, slabs: list[tuple[int, int]], size: int
) -> tuple[Tensor, Tensor]:
    """Codes ``[n, I]`` int32 and scales ``[n, tiles]`` float16."""
    words, tiles = payload.view(torch.int32), tiled.tiles(size)
    codes, scales = [torch.zeros(0, size, dtype=torch.int32)], [scale.new_zeros(0, tiles)]
    for width, rows in slabs:
        count = rows * tiles * _GROUPS * width
        groups = _rows_of_slab(words[:count], width, rows, tiles)
        codes.append(_codes_of_groups(groups, width)[:, :size])
        scales.append(scale[: rows * tiles].view(tiles, rows).T)
        words, scale = words[count:], scale[rows * tiles :]
    return torch.cat(codes), torch.cat(scales)


def _rows_of_slab(words: Tensor, width: int, rows: int, tiles: int) -> Tensor:
    """``[rows, groups, width]`` of the words of a slab: tile, stage, group, row, word."""
    pieces = []
    by_tile = words.view(tiles, -1)
    for first in range(0, rows, STAGE):
        count = min(STAGE, rows - first)
        start = first * _GROUPS * width
        stage = by_tile[:, start : start + count * _GROUPS * width].view(tiles, _GROUPS, count, width)
        pieces.append(stage.permute(2, 0, 1, 3).reshape(count, tiles * _GROUPS, width))
    return torch.cat(pieces)


def _codes_of_groups(groups: Tensor, width: int) -> Tensor:
    """Codes ``[rows, groups * 32]`` int32 of words ``[rows, groups, width]`` int32."""
    rows = len(groups)
    if width == 16:
        return groups.contiguous().view(torch.int16).view(rows, -1).to(torch.int32) & 0xFFFF
    octets = groups.contiguous().view(torch.uint8).numpy().reshape(rows, -1, width, 4)
    planes = np.unpackbits(octets, axis=-1, bitorder="little")
    codes = np.zeros_like(planes[:, :, 0])
    for plane in range(width):
        codes |= planes[:, :, plane] << plane
    return torch.from_numpy(codes.reshape(rows, -1).astype(np.int32))


def _check_values(name: str, rows: ProjectionRows) -> None:
    """Everything that is decoded must be finite."""
    if not bool(rows.gains.isfinite().all()):
        raise CheckpointError(f"{name}_s_buffer holds values that are not finite")
    if not bool(rows.scales.isfinite().all()):
        raise CheckpointError(f"{name}_scale_buffer holds values that are not finite")
    for width in torch.unique(rows.bits).tolist():
        pick = rows.bits == width
        scales = rows.scales[pick]
        if width == 16 and bool((scales != 1).any()):
            raise CheckpointError(f"{name}_scale_buffer scales rows of 16 bits, which the format does not")
        if width < 16 and 2 ** (width - 1) * float(scales.abs().max()) <= torch.finfo(torch.float16).max:
            continue  # so no code can decode to infinity
        if not bool(tiled.decode(rows.codes[pick], width, scales).isfinite().all()):
            raise CheckpointError(f"{name}_payload_buffer decodes to values that are not finite")
