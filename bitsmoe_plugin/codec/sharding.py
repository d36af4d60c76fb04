"""What one of several processes holds of a packed layer, cut without unpacking.

Tensor parallel: a range of the 32-value blocks of every row (see ``layout``). Expert parallel: some of
the experts. The shard is again a packed layer, of fewer experts or a smaller intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts, RowIndex
from bitsmoe_plugin.codec.tiled import TILE, tiles
from bitsmoe_plugin.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """Part of a layer.

    Attributes:
        experts: ids in the whole layer, in the order that they have in the shard.
        blocks: first block of every row, and the one after the last.
    """

    experts: tuple[int, ...]
    blocks: tuple[int, int]


def split_blocks(name: str, shape: LayerShape, parts: int, part: int, unit: int = BLOCK) -> tuple[int, int]:
    """The blocks of every row that process ``part`` of ``parts`` holds under tensor parallelism.

    Args:
        name: of the layer, for errors.
        unit: values that stay together, whole blocks (``PackedSpec.split_unit``).

    Raises:
        ConfigError: the rows cannot be split into equal numbers of whole units.
    """
    size = shape.intermediate_size
    if parts == 1:
        return 0, shape.blocks
    if size % (parts * unit):
        possible = [str(n) for n in range(1, size // unit + 1) if size % (n * unit) == 0] or ["1"]
        raise ConfigError(
            f"{name}: intermediate_size {size} cannot be split over tensor_parallel_size {parts}: {size} "
            f"must be a multiple of {parts}*{unit}. Use {', '.join(possible)}, or expert parallelism "
            "(vLLM: --enable-expert-parallel, transformers: ep_size), which does not split rows"
        )
    each = size // (parts * BLOCK)
    return part * each, (part + 1) * each


def whole(shape: LayerShape) -> Shard:
    """All of a layer."""
    return Shard(tuple(range(shape.num_experts)), (0, shape.blocks))


def shard_shape(shape: LayerShape, shard: Shard) -> LayerShape:
    """Sizes of a shard as a layer of its own."""
    first, last = shard.blocks
    size = min(last * BLOCK, shape.intermediate_size) - first * BLOCK
    return replace(shape, num_experts=len(shard.experts), intermediate_size=size)


def slice_packed(
    packed: PackedExperts,
    widths: tuple[int, ...],
    shape: LayerShape,
    shard: Shard,
    kept: tuple[int, ...] = (),
) -> PackedExperts:
    """The packed tensors of a shard.

    Args:
        packed: the whole layer; its payload is read only where the shard lies.
        widths: of the config.
        shape: of the whole layer.
        kept: ids of the experts that are stored as they were.
    """
    index = layout.index_rows(packed.row_codes, widths, shape)
    return replace(
        packed,
        row_codes=packed.row_codes[:, list(shard.experts)].clone(),
        payload=_slice_payload(packed.payload, index, shape, shard),
        scale_grid=packed.scale_grid.clone(),
        input_basis=packed.input_basis.clone(),
        input_scales=packed.input_scales.clone(),
        output_basis=packed.output_basis.clone(),
        output_scales=packed.output_scales.clone(),
        **_slice_biases(packed, shard),
        **_slice_tiles(packed, index, shard),
        **_slice_kept(packed, shard, kept),
    )


def shard_kept(kept: tuple[int, ...], shard: Shard) -> tuple[int, ...]:
    """Which experts of a shard are stored as they were, by their ids in the shard."""
    return tuple(local for local, expert in enumerate(shard.experts) if expert in kept)


def _columns(shard: Shard) -> slice:
    """The values of every row; the last block may be shorter."""
    return slice(shard.blocks[0] * BLOCK, shard.blocks[1] * BLOCK)


def _slice_biases(packed: PackedExperts, shard: Shard) -> dict[str, Tensor]:
    """Of shards that split the rows, which add up, only the first adds the bias of down."""
    if packed.input_bias is None or packed.output_bias is None:
        return {}
    experts = list(shard.experts)
    down = packed.output_bias[experts]
    return {
        "input_bias": packed.input_bias[experts][..., _columns(shard)].contiguous(),
        "output_bias": down if shard.blocks[0] == 0 else torch.zeros_like(down),
    }


def _slice_tiles(packed: PackedExperts, index: RowIndex, shard: Shard) -> dict[str, Tensor]:
    """Scales of the grid "tiled", of a shard that starts with a tile."""
    if packed.tile_scales is None or packed.row_gains is None:
        return {}
    first, last = shard.blocks[0] * BLOCK, shard.blocks[1] * BLOCK
    assert first % TILE == 0, "split_blocks keeps tiles together"
    device = packed.row_gains.device
    rows = [
        index.row_starts[factor][expert] + torch.arange(sum(index.counts[factor][expert]), device=device)
        for factor in range(len(index.counts))
        for expert in shard.experts
    ]
    chosen = torch.cat(rows)
    return {
        "tile_scales": packed.tile_scales[chosen, first // TILE : tiles(last)].contiguous(),
        "row_gains": packed.row_gains[chosen],
    }


def _slice_kept(packed: PackedExperts, shard: Shard, kept: tuple[int, ...]) -> dict[str, Tensor | None]:
    here = [kept.index(shard.experts[local]) for local in shard_kept(kept, shard)]
    if packed.kept_input is None or packed.kept_output is None:
        return {}
    if not here:
        return {"kept_input": None, "kept_output": None}
    return {
        "kept_input": packed.kept_input[here][:, :, _columns(shard)].contiguous(),
        "kept_output": packed.kept_output[here][..., _columns(shard)].contiguous(),
    }


def _row_bits(index: RowIndex, factor: int, expert: int) -> int:
    """Bits of one value of every row of one factor of one expert, summed."""
    return sum(w * n for w, n in zip(index.widths, index.counts[factor][expert], strict=True))


def _slice_payload(payload: Tensor, index: RowIndex, shape: LayerShape, shard: Shard) -> Tensor:
    first, last = shard.blocks
    pairs = [(factor, expert) for factor in range(len(index.counts)) for expert in shard.experts]
    sizes = [_row_bits(index, factor, expert) * (last - first) for factor, expert in pairs]
    out = payload.new_empty(sum(sizes))
    for (factor, expert), part in zip(pairs, out.split(sizes), strict=True):
        start = index.starts[factor][expert]
        _copy_blocks(payload[start:], part, index, index.counts[factor][expert], shape.blocks, shard.blocks)
    return out


def _copy_blocks(
    source: Tensor,
    target: Tensor,
    index: RowIndex,
    counts: Sequence[int],
    blocks: int,
    chosen: tuple[int, int],
) -> None:
    """Copy a range of blocks of every row of one factor of one expert.

    Args:
        source: ``[...]`` int32 payload from the first row on.
        target: ``[words]`` int32.
        counts: rows of each width of ``index.widths``.
        blocks: of a row of the source.
        chosen: first block, and the one after the last.
    """
    first, last = chosen
    read = written = 0
    for width, count in zip(index.widths, counts, strict=True):
        words, taken = count * blocks * width, count * (last - first) * width
        rows = source[read : read + words].view(count, blocks, width)
        target[written : written + taken].view(count, last - first, width).copy_(rows[:, first:last])
        read, written = read + words, written + taken


def local_experts(expert_map: Tensor | None, num_experts: int) -> tuple[int, ...]:
    """Global ids of the experts that a process holds, in local order.

    Args:
        expert_map: ``[num_experts]`` integer, global id -> local id or -1; None if all are held.
    """
    if expert_map is None:
        return tuple(range(num_experts))
    held = torch.nonzero(expert_map >= 0).flatten()
    return tuple(held[torch.argsort(expert_map[held])].tolist())
