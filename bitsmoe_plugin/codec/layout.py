"""Packed layout of one MoE layer, format version 2.

Symbols: E num_experts, I intermediate_size, H hidden_size, r rank (= H), B = ceil(I / 32),
n input bases: 1 shared by gate and up, or 2, gate's rows above up's. f factors: 3, gate, up and down, or 2,
up and down, of experts without a gate, which have 1 input basis.

=====================  =======  ======================  =========================================
tensor                 dtype    shape                   content
=====================  =======  ======================  =========================================
bitsmoe_row_codes      uint8    [f, E, r]               width index << 5 | scale code, per row
bitsmoe_scale_grid     int16    [f, 2, r]               low and step of ``scale_grid.ScaleGrid``
bitsmoe_payload        int32    [words]                 codes of all rows, see below
bitsmoe_input_basis    int32    [n * r, H * bits / 32]  codes (int16 [.., H] if basis_bits is 16)
bitsmoe_input_scales   int16    [n * r, H / group]      (empty if basis_bits is 16)
bitsmoe_output_basis   int32    [H, r * bits / 32]      as the input basis
bitsmoe_output_scales  int16    [H, r / group]
=====================  =======  ======================  =========================================

Families whose experts have biases, and layers with experts that are kept as they were (n of them), also
have, in the original dtype:

=====================  =======  ======================  =========================================
bitsmoe_input_bias     int16    [E, f - 1, I]           of gate and up, or of up
bitsmoe_output_bias    int16    [E, H]                  of down
bitsmoe_kept_input     int16    [n, f - 1, I, H]        gate and up, or up, of the kept experts
bitsmoe_kept_output    int16    [n, H, I]               their down; their rows all have width 0
=====================  =======  ======================  =========================================

(int32 if the original is float32.) Layers of the grid "tiled" (``tiled``), of which n rows are stored, have
scale codes of 0 and no scale grid, but

=====================  =======  ======================  =========================================
bitsmoe_scale_grid     int16    [0]
bitsmoe_tile_scales    int16    [n, ceil(I / 128)]      of the rows in the order of the payload
bitsmoe_row_gains      int16    [n]
=====================  =======  ======================  =========================================

and their bases of 8 bits are on that grid, too. int16 tensors hold the bits of float16 values, or of the
original: an integer dtype is left alone by everything that casts a model (``model.to(dtype)``, loaders that
convert floats to the model's dtype).

The first axis is the factor: gate, up, down, or up, down. ``payload`` holds factor after factor,
expert after expert; the rows of one expert are ordered by falling width, then by rank index, and
rows of width 0 are absent. So the offset of every row follows from ``row_codes`` alone. A row of
b bits is B blocks of b words; a block holds 32 codes, code i in bits i*b .. (i+1)*b of the
block, least significant bit first. With the grid "trellis", rows of up to 4 bits are trellis-coded:
value i is ``trellis.table(b)[window]`` times the scale, where the window's 8 bits are those before
bit (i+1)*b of the block's ring; wider rows, and with the grid "uniform" all, are on ``uniform``. A
tensor parallel shard is a range of blocks of every row, of whole tiles with the grid "tiled".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bitsmoe_plugin.codec import bit_strings, row_codec, tiled, trellis, uniform
from bitsmoe_plugin.codec.backends import backend_for
from bitsmoe_plugin.codec.basis import QuantizedBasis
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.names import FACTORS as FACTORS
from bitsmoe_plugin.codec.names import FORMAT_VERSION as FORMAT_VERSION
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS, ScaleGrid
from bitsmoe_plugin.errors import QuantizationError


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer that, with the row codes, fix the size of every packed tensor.

    Attributes:
        has_gate: experts are down(act(gate) * up), not down(act(up)).
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool = True

    @property
    def factors(self) -> tuple[str, ...]:
        """Projections of an expert, in the order in which they are stored; the last is down."""
        return FACTORS if self.has_gate else FACTORS[1:]

    @property
    def inputs(self) -> int:
        """Projections that read the hidden states: gate and up, or up alone."""
        return len(self.factors) - 1

    @property
    def rank(self) -> int:
        return self.hidden_size

    @property
    def blocks(self) -> int:
        return -(-self.intermediate_size // BLOCK)

    @property
    def weights(self) -> int:
        """Expert weights of the unquantized layer."""
        return len(self.factors) * self.num_experts * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class PackedExperts:
    """The packed tensors of one layer; names, dtypes and shapes as in the module text.

    Those that a layer does not have are None.
    """

    row_codes: Tensor
    scale_grid: Tensor
    payload: Tensor
    input_basis: Tensor
    input_scales: Tensor
    output_basis: Tensor
    output_scales: Tensor
    input_bias: Tensor | None = None
    output_bias: Tensor | None = None
    kept_input: Tensor | None = None
    kept_output: Tensor | None = None
    tile_scales: Tensor | None = None
    row_gains: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(buffer name, tensor) of every stored tensor."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield f"bitsmoe_{field.name}", tensor

    def cpu(self) -> PackedExperts:
        """The same on the CPU; no copy if it is there."""
        return PackedExperts(
            **{name.removeprefix("bitsmoe_"): tensor.cpu() for name, tensor in self.tensors()}
        )

    def stored_bits(self) -> int:
        """Everything that is stored for the experts of this layer."""
        return sum(8 * t.numel() * t.element_size() for _, t in self.tensors())


_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
ORIGINAL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _BITS}
"""Name -> dtype that original tensors can have."""


def original_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are stored unquantized: their own, float32 for float64.

    Raises:
        QuantizationError: no dtype of weights.
    """
    if dtype == torch.float64:
        return torch.float32
    if dtype not in _BITS:
        raise QuantizationError(
            f"experts are {dtype}; load the model in {', '.join(ORIGINAL_DTYPES)} (dtype=)"
        )
    return dtype


def store_bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor of one of ``ORIGINAL_DTYPES`` as integers."""
    return tensor.contiguous().view(_BITS[tensor.dtype])


def stored_dtype(original: str) -> torch.dtype:
    """Dtype of ``store_bits`` of a tensor of a dtype of ``ORIGINAL_DTYPES``."""
    return _BITS[ORIGINAL_DTYPES[original]]


@dataclass(frozen=True)
class RowIndex:
    """Where the rows of every (factor, expert) stand in the payload.

    Attributes:
        order: ``[f, E, r]`` int64, rank indices by falling width, then rising index.
        counts: ``[f][E][widths]`` rows of each width, widths in the order given.
        starts: ``[f][E]`` first payload word of the expert's factor.
        widths: falling, without 0.
        words: length of the payload.
        row_starts: ``[f][E]`` stored rows before those of the expert's factor.
        rows: stored rows.
    """

    order: Tensor
    counts: list[list[list[int]]]
    starts: list[list[int]]
    widths: tuple[int, ...]
    words: int
    row_starts: list[list[int]]
    rows: int

    def stored_order(self, factor: int, expert: int) -> Tensor:
        """Rank indices ``[n]`` int64 of the stored rows of one factor of one expert, in their order."""
        return self.order[factor, expert, : sum(self.counts[factor][expert])]


def row_widths(row_codes: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Bits of every row, ``[f, E, r]`` int64."""
    table = torch.tensor(widths, device=row_codes.device)
    return table[(row_codes // SCALE_LEVELS).long()]


def experts_without_rows(row_codes: Tensor, widths: tuple[int, ...], experts: tuple[int, ...]) -> bool:
    """True if none of ``experts`` stores a row."""
    return not bool(row_widths(row_codes, widths)[:, list(experts)].any())


def index_rows(row_codes: Tensor, widths: tuple[int, ...], shape: LayerShape) -> RowIndex:
    """Derive order and offsets of all rows from the row codes ``[f, E, r]`` uint8."""
    bits = row_widths(row_codes, widths)
    falling = tuple(sorted((w for w in widths if w), reverse=True))
    order = torch.argsort(-bits, dim=-1, stable=True)
    counts = torch.stack([(bits == w).sum(-1) for w in falling], -1)
    words = (counts * torch.tensor(falling, device=counts.device)).sum(-1) * shape.blocks
    starts, total = _starts(words)
    row_starts, rows = _starts(counts.sum(-1))
    return RowIndex(
        order=order,
        counts=counts.tolist(),
        starts=starts,
        widths=falling,
        words=total,
        row_starts=row_starts,
        rows=rows,
    )


def _starts(sizes: Tensor) -> tuple[list[list[int]], int]:
    """Where pieces of ``sizes`` ``[f, E]`` start, one after another, and where the last ends."""
    ends = sizes.flatten().cumsum(0)
    return (ends - sizes.flatten()).view_as(sizes).tolist(), int(ends[-1])


def pack_expert(codes: Tensor, row_bits: Tensor) -> Tensor:
    """Payload words ``[words]`` int32 of one factor of one expert, on the CPU.

    Args:
        codes: ``[r, I]`` int32, or padded to whole blocks.
        row_bits: ``[r]`` int64.
    """
    return pack_experts(codes[None], row_bits[None])[0]


def pack_experts(codes: Tensor, row_bits: Tensor) -> list[Tensor]:
    """``pack_expert`` of one factor of several experts: codes ``[e, r, I]``, widths ``[e, r]``."""
    return backend_for(codes).pack(bit_strings.whole_blocks(codes), row_bits)


def pack_row_codes(row_bits: Tensor, scale_codes: Tensor, widths: tuple[int, ...]) -> Tensor:
    """``[f, E, r]`` uint8 of widths (int64) and scale codes (uint8, below 32)."""
    device = row_bits.device
    lookup = torch.zeros(17, dtype=torch.int64, device=device)
    lookup[torch.tensor(widths, device=device)] = torch.arange(len(widths), device=device)
    return (lookup[row_bits] * SCALE_LEVELS + scale_codes).to(torch.uint8)


def pack_scale_grid(grid: ScaleGrid) -> Tensor:
    """``[f, 2, r]`` int16 of the scale grids ``[f, r]`` of all factors."""
    return torch.stack([grid.low, grid.step], 1).view(torch.int16)


def pack_basis(basis: QuantizedBasis) -> tuple[Tensor, Tensor]:
    """Stored codes and scales of a basis."""
    scales = basis.scales.to(torch.float16).view(torch.int16)
    if basis.bits == 16:
        return basis.codes.contiguous().view(torch.int16), scales
    return bit_strings.pack_codes(basis.codes, basis.bits), scales


def unpack_basis(words: Tensor, scales: Tensor, bits: int, columns: int, grid: str = "uniform") -> Tensor:
    """``[rows, columns]`` float32 of a stored basis; ``grid`` is that of the layer's rows."""
    if bits == 16:
        return words.view(torch.float16).float()
    codes = bit_strings.unpack_codes(words, bits, columns)
    if grid == row_codec.TILED:
        return tiled.decode(codes, bits, scales.view(torch.float16))
    group_size = columns // scales.shape[1]
    return QuantizedBasis(codes, scales.view(torch.float16), bits, group_size).dequantize()


def row_scales(row_codes: Tensor, scale_grid: Tensor) -> Tensor:
    """Scales ``[f, E, r]`` float32 of all rows (of width-0 rows too; they are not used)."""
    grid = scale_grid.view(torch.float16)
    return ScaleGrid(grid[:, 0], grid[:, 1]).decode((row_codes % SCALE_LEVELS).float())


def unpack_rows(
    payload: Tensor, index: RowIndex, scales: Tensor, factor: int, expert: int, size: int, grid: str
) -> tuple[Tensor, Tensor]:
    """The stored rows of one factor of one expert.

    Args:
        payload: ``[words]`` int32.
        scales: ``[f, E, r]`` float32, from ``row_scales``.
        size: intermediate_size.
        grid: one of ``row_codec.GRIDS``.

    Returns:
        rows ``[n, I]`` float32 and their rank indices ``[n]`` int64, n = rows not dropped.
    """
    order = index.stored_order(factor, expert)
    own = scales[factor, expert, order, None]
    pieces = [
        _decode_words(words, own[first : first + len(words)], width, size, grid)
        for width, first, words in _stored_words(payload, index, factor, expert, -(-size // BLOCK))
    ]
    return torch.cat([payload.new_zeros((0, size), dtype=torch.float32), *pieces]), order


def unpack_row_codes(
    payload: Tensor, index: RowIndex, factor: int, expert: int, size: int
) -> tuple[Tensor, Tensor]:
    """As ``unpack_rows``, but the codes, ``[n, padded(I)]`` int32."""
    order = index.stored_order(factor, expert)
    whole = row_codec.padded(size)
    pieces = [
        bit_strings.unpack_codes(words, width, whole)
        for width, _, words in _stored_words(payload, index, factor, expert, whole // BLOCK)
    ]
    return torch.cat([payload.new_zeros((0, whole)), *pieces]), order


def unpack_tiled_rows(
    packed: PackedExperts, index: RowIndex, factor: int, expert: int, size: int
) -> tuple[Tensor, Tensor]:
    """As ``unpack_rows``, of a layer of the grid "tiled"."""
    assert packed.tile_scales is not None
    assert packed.row_gains is not None
    order = index.stored_order(factor, expert)
    own = slice(index.row_starts[factor][expert], index.row_starts[factor][expert] + len(order))
    scales = packed.tile_scales[own].view(torch.float16)
    gains = packed.row_gains[own].view(torch.float16).float()[:, None]
    pieces = [
        tiled.decode(bit_strings.unpack_codes(words, width, size), width, scales[first : first + len(words)])
        for width, first, words in _stored_words(packed.payload, index, factor, expert, -(-size // BLOCK))
    ]
    return torch.cat([packed.payload.new_zeros((0, size), dtype=torch.float32), *pieces]) * gains, order


def _stored_words(
    payload: Tensor, index: RowIndex, factor: int, expert: int, blocks: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(width, rows of the factor of the expert before these, ``[rows, blocks * width]`` int32) by width."""
    start, done = index.starts[factor][expert], 0
    for width, count in zip(index.widths, index.counts[factor][expert], strict=True):
        end = start + count * blocks * width
        if count:
            yield width, done, payload[start:end].view(count, -1)
        start, done = end, done + count


def _decode_words(words: Tensor, scales: Tensor, width: int, size: int, grid: str) -> Tensor:
    """``[rows, size]`` float32 of packed rows ``[rows, blocks * width]`` int32, scales ``[rows, 1]``."""
    if row_codec.uses_trellis(width, grid):
        return trellis.table(width).to(words.device)[bit_strings.unpack_windows(words, width, size)] * scales
    return uniform.decode(bit_strings.unpack_codes(words, width, size).float(), scales, width)


def fixed_bits(shape: LayerShape, basis_bits: int, basis_group_size: int, input_bases: int) -> dict[str, int]:
    """Stored bits of one layer that no allocation changes, by part."""
    h, r = shape.hidden_size, shape.rank
    columns = h if basis_bits == 16 else row_codec.padded(h)
    scales = 0 if basis_bits == 16 else 16 * r * (h // basis_group_size)
    factors, input_bases = len(shape.factors), min(input_bases, shape.inputs)
    return {
        "bases": (input_bases + 1) * (r * columns * basis_bits + scales),
        "row_codes": 8 * factors * shape.num_experts * r,
        "scale_grids": 16 * factors * 2 * r,
    }


def row_sizes(shape: LayerShape, widths: tuple[int, ...]) -> list[int]:
    """Payload bits of one row at each width."""
    return [shape.blocks * BLOCK * width for width in widths]
