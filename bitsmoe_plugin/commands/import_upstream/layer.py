"""One MoE layer of the authors' format as a packed layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.codec import bit_strings, layout, tiled
from bitsmoe_plugin.codec.layout import FACTORS, LayerShape, PackedExperts
from bitsmoe_plugin.commands.import_upstream import bases
from bitsmoe_plugin.commands.import_upstream.files import LayerTensors, UpstreamFiles
from bitsmoe_plugin.commands.import_upstream.rows import ProjectionRows, read_projection
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.presets import ALL_WIDTHS


@dataclass(frozen=True)
class ConvertedLayer:
    """Attributes:
    packed: of the grid "tiled".
    kept: ids of the experts that are not packed.
    dtype: of those; bfloat16 if there are none.
    basis_bits: 8 or 16.
    """

    packed: PackedExperts
    kept: tuple[int, ...]
    dtype: torch.dtype
    basis_bits: int


def convert_layer(files: UpstreamFiles, tensors: LayerTensors, shape: LayerShape) -> ConvertedLayer:
    """Read one layer and pack it, one projection of one expert in memory at a time.

    Raises:
        CheckpointError: naming the tensor and what is wrong with it.
    """
    moe = tensors.name.removesuffix("experts")
    gate, up, down = (
        bases.read_basis(
            f"{moe}{name}",
            {part: files.read(stored) for part, stored in tensors.bases[name].items()},
            shape.hidden_size,
            output=name == bases.NAMES[2],
        )
        for name in bases.NAMES
    )
    h, r = shape.hidden_size, shape.rank
    inputs = [basis.stored(r, h) for basis in (gate, up)]
    ranks = len(gate.codes), len(up.codes), down.codes.shape[1]
    kept, dtype = _read_dense(files, tensors, shape)
    packed = PackedExperts(
        **_pack_rows(files, tensors, ranks, shape),
        scale_grid=torch.zeros(0, dtype=torch.int16),
        input_basis=torch.cat([codes for codes, _ in inputs]),
        input_scales=torch.cat([scales for _, scales in inputs]),
        **dict(zip(("output_basis", "output_scales"), down.stored(h, r), strict=True)),
        **kept,
    )
    return ConvertedLayer(packed, tuple(sorted(tensors.dense)), dtype, gate.bits)


def _pack_rows(
    files: UpstreamFiles, tensors: LayerTensors, ranks: tuple[int, ...], shape: LayerShape
) -> dict[str, Tensor]:
    """row_codes, payload, tile_scales and row_gains of all experts."""
    row_bits = torch.zeros(3, shape.num_experts, shape.rank, dtype=torch.int64)
    size = shape.intermediate_size
    payload = [torch.zeros(0, dtype=torch.int32)]
    scales = [torch.zeros(0, tiled.tiles(size), dtype=torch.float16)]
    gains = [torch.zeros(0, dtype=torch.float16)]
    for f, factor in enumerate(FACTORS):
        for expert in range(shape.num_experts):
            if expert not in tensors.packed:
                continue
            buffers = {
                leaf.removeprefix(f"{factor}_"): files.read(name)
                for leaf, name in tensors.packed[expert].items()
                if leaf.startswith(f"{factor}_")
            }
            rows = read_projection(f"{tensors.name}.{expert}.{factor}", buffers, ranks[f], size)
            row_bits[f, expert, rows.ranks] = rows.bits
            order = _packed_order(rows)
            for width in torch.unique(rows.bits).flip(0).tolist():
                chosen = order[rows.bits[order] == width]
                payload.append(bit_strings.pack_codes(rows.codes[chosen], width).flatten())
            scales.append(rows.scales[order])
            gains.append(rows.gains[order])
    no_scales = torch.zeros(row_bits.shape, dtype=torch.uint8)
    return {
        "row_codes": layout.pack_row_codes(row_bits, no_scales, ALL_WIDTHS),
        "payload": torch.cat(payload),
        "tile_scales": torch.cat(scales).view(torch.int16),
        "row_gains": torch.cat(gains).view(torch.int16),
    }


def _packed_order(rows: ProjectionRows) -> Tensor:
    """``[n]`` int64: rows by falling width, then rising rank, as ``layout.RowIndex.order`` has them."""
    by_rank = torch.argsort(rows.ranks)
    return by_rank[torch.argsort(-rows.bits[by_rank], stable=True)]


def _read_dense(
    files: UpstreamFiles, tensors: LayerTensors, shape: LayerShape
) -> tuple[dict[str, Tensor], torch.dtype]:
    """kept_input and kept_output of the experts that are not packed, and their dtype."""
    if not tensors.dense:
        return {}, torch.bfloat16
    h, i = shape.hidden_size, shape.intermediate_size
    wanted = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    found: dict[str, list[Tensor]] = {factor: [] for factor in FACTORS}
    for expert in sorted(tensors.dense):
        for factor in FACTORS:
            name = tensors.dense[expert][f"{factor}_proj.weight"]
            weight = files.read(name)
            if tuple(weight.shape) != wanted[factor] or weight.dtype not in layout.ORIGINAL_DTYPES.values():
                raise CheckpointError(
                    f"{name} is {weight.dtype} {list(weight.shape)}; the model asks for floats, "
                    f"{list(wanted[factor])}"
                )
            found[factor].append(weight)
    dtypes = {weight.dtype for weights in found.values() for weight in weights}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{tensors.name}: unpacked experts have several dtypes: {sorted(map(str, dtypes))}"
        )
    gate, up, down = (torch.stack(found[factor]) for factor in FACTORS)
    kept = {"kept_input": torch.stack([gate, up], 1), "kept_output": down}
    return {name: layout.store_bits(tensor) for name, tensor in kept.items()}, dtypes.pop()
