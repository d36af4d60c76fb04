"""Random packed layers and inputs for the tests of the Triton kernels, which run in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout, row_codec
from bitsmoe_plugin.codec.basis import quantize_basis
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS, ScaleGrid
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.codec.tiled import TILE, tiles
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer


@dataclass(frozen=True)
class Inputs:
    """``[T, H]`` hidden states, ``[T, k]`` expert ids and router weights."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.ids, self.weights


def random_widths(shape: LayerShape, widths: tuple[int, ...], seed: int = 0) -> Tensor:
    """``[f, E, r]`` int64, members of ``widths``."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(
        len(widths), (len(shape.factors), shape.num_experts, shape.rank), generator=generator
    )
    return torch.tensor(widths)[choice]


def random_layer(
    shape: LayerShape,
    widths: tuple[int, ...] = ALL_WIDTHS,
    grid: str = "trellis",
    basis_bits: int = 4,
    group_size: int = 16,
    input_bases: int = 1,
    row_bits: Tensor | None = None,
    seed: int = 0,
    has_bias: bool = False,
) -> tuple[PackedSpec, PackedExperts]:
    """A layer of random codes and scales; ``row_bits`` ``[f, E, r]`` instead of random widths.

    With the grid "tiled", bases of 8 bits have a scale per 128 columns whatever ``group_size`` says.
    """
    group_size = TILE if grid == "tiled" else group_size
    generator = torch.Generator().manual_seed(seed)
    h, size = shape.hidden_size, shape.intermediate_size
    row_bits = random_widths(shape, widths, seed) if row_bits is None else row_bits
    codes = torch.randint(2**16, (*row_bits.shape, row_codec.padded(size)), generator=generator)
    codes %= 2 ** row_bits[..., None]
    if grid == "tiled":  # rows of 16 bits are float16
        halves = torch.randn(codes.shape, generator=generator).half().view(torch.int16).int() % 2**16
        codes = torch.where(row_bits[..., None] == 16, halves, codes.int())
    scale_codes = torch.randint(SCALE_LEVELS, row_bits.shape, generator=generator, dtype=torch.uint8)
    low, step = torch.rand(2, len(shape.factors), shape.rank, generator=generator)
    scale_grid = ScaleGrid((low - 3).half(), (step / 16).half())
    bases = [
        quantize_basis(
            torch.randn(rows, h, dtype=torch.double, generator=generator) / h**0.5, basis_bits, group_size
        )
        for rows in (input_bases * h, h)
    ]
    words = [
        layout.pack_expert(c, b) for c, b in zip(codes.flatten(0, 1), row_bits.flatten(0, 1), strict=True)
    ]
    packed = PackedExperts(
        layout.pack_row_codes(row_bits, scale_codes, widths),
        layout.pack_scale_grid(scale_grid),
        torch.cat(words),
        *layout.pack_basis(bases[0]),
        *layout.pack_basis(bases[1]),
    )
    words = packed.payload.numel()
    spec = PackedSpec(shape, widths, basis_bits, group_size, input_bases, words, grid, has_bias)
    if grid == "tiled":
        spec, packed = _on_tiles(spec, packed, row_bits, generator)
    if has_bias:
        sizes = (shape.num_experts, shape.inputs, size), (shape.num_experts, h)
        stored = [torch.randn(s, generator=generator).bfloat16().view(torch.int16) for s in sizes]
        packed = replace(packed, input_bias=stored[0], output_bias=stored[1])
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors()} == spec.tensors()
    return spec, packed


def _on_tiles(
    spec: PackedSpec, packed: PackedExperts, row_bits: Tensor, generator: torch.Generator
) -> tuple[PackedSpec, PackedExperts]:
    """Scales per tile of 128 values and gains per row, of either sign, instead of scale codes and a grid."""
    rows, tiles_of_row = int((row_bits > 0).sum()), tiles(spec.shape.intermediate_size)
    each = torch.randn(rows, tiles_of_row + 1, generator=generator)
    bits = row_bits.flatten(0, 1)
    ordered = torch.cat([row.sort(descending=True).values for row in bits])
    # Values of all widths are about as large.
    size = 2.0 ** (1 - ordered[ordered > 0].clamp_max(8))
    size[ordered[ordered > 0] == 16] = 1.0
    basis_scales = {
        name: (getattr(packed, name).view(torch.float16) / 128).view(torch.int16)
        for name in ("input_scales", "output_scales")
    }
    packed = replace(
        packed,
        row_codes=packed.row_codes // SCALE_LEVELS * SCALE_LEVELS,
        scale_grid=packed.scale_grid.new_empty(0),
        tile_scales=(each[:, 1:] * size[:, None]).half().view(torch.int16),
        row_gains=each[:, 0].half().view(torch.int16),
        **basis_scales,
    )
    return replace(spec, stored_rows=rows), packed


def random_inputs(shape: LayerShape, tokens: int, k: int = 2, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator)
    score = torch.rand(tokens, shape.num_experts, generator=generator)
    weights, ids = score.topk(k)
    return Inputs(hidden, ids, weights / weights.sum(-1, keepdim=True))


def reference(spec: PackedSpec, packed: PackedExperts, inputs: Inputs, activation: str = "silu") -> Tensor:
    """The float32 reference of ``runtime.reference_layer``, for float32 inputs."""
    return ReferenceLayer.prepare(spec, packed, gating(activation)).forward(*inputs.tensors())


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """||value - wanted|| / ||wanted||."""
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())
