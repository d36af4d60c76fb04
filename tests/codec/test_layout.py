"""The packed layout against its description, read bit by bit by a second implementation."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_plugin.codec import bit_strings, layout, row_codec, trellis
from bitsmoe_plugin.codec.basis import quantize_basis
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts, row_sizes
from bitsmoe_plugin.codec.row_codec import GRIDS
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS, ScaleGrid
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.codec.trellis.tables import TABLES
from bitsmoe_plugin.presets import ALL_WIDTHS

STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 6: 0.1041, 8: 0.0308, 16: 12.6 / 65536}
"""Part of the format: other steps would decode existing checkpoints to other weights."""
TABLE_SHA256 = {
    1: "f7c449bae2ba212d99ff27ea770c2c98840442ac7fd37d257ce0cc803b62acc8",
    2: "afe16daba1e3ab5d6c8edeac684dd9b918b311bf86e6bd0d6ae7b75935bc625e",
    3: "96d0b5d261c515f0034613d3773a0b16b1e13e383fd477657de63abfe382ecb0",
    4: "7941a52ed1229a48388af2466d0c799271cad2e6ae3b1ce13a61cc2c934c82fe",
}
"""Likewise for the trellis of format version 2."""
SHAPE = LayerShape(num_experts=3, hidden_size=7, intermediate_size=40)


def random_codes(rows: int, n: int, bits: int, seed: int) -> Tensor:
    return torch.randint(2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@given(
    bits=st.integers(1, 16),
    rows=st.integers(1, 5),
    n=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
def test_codes_survive_packing(bits: int, rows: int, n: int, seed: int) -> None:
    """Guards against lost bits where a value straddles two words, sign bits and padding."""
    codes = random_codes(rows, n, bits, seed)
    words = bit_strings.pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-n // 32) * bits)
    assert torch.equal(bit_strings.unpack_codes(words, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_largest_codes_set_every_bit(bits: int) -> None:
    """Guards against a mask that is one bit short: 32 values of b ones are b words of ones."""
    codes = torch.full((1, 32), 2**bits - 1)
    assert bit_strings.pack_codes(codes, bits).tolist() == [[-1] * bits]


@pytest.mark.parametrize("bits", range(1, 17))
def test_compiled_packing_is_that_of_the_reference(bits: int) -> None:
    """Guards the format: bitwise the same words, for any width and for a last block that is not full."""
    codes = torch.randint(2**bits, (7, 72), generator=torch.Generator().manual_seed(bits))
    padded = torch.nn.functional.pad(codes, (0, 24))
    assert torch.equal(bit_strings.pack_codes(codes, bits), bit_strings.pack_codes_reference(padded, bits))


@given(
    bits=st.integers(1, 16),
    blocks=st.integers(1, 4),
    cut=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=st.integers(0, 2**31),
)
def test_a_range_of_blocks_is_the_packed_range_of_columns(
    bits: int, blocks: int, cut: tuple[int, int], seed: int
) -> None:
    """Guards the tensor parallel promise: shards are cut without unpacking."""
    first, last = min(min(cut), blocks - 1), max(*cut, min(cut) + 1)
    codes = random_codes(3, 32 * blocks, bits, seed)
    shard = bit_strings.pack_codes(codes, bits).view(3, blocks, bits)[:, first:last]
    assert torch.equal(shard.reshape(3, -1), bit_strings.pack_codes(codes[:, 32 * first : 32 * last], bits))


def random_layer(seed: int, widths: tuple[int, ...] = ALL_WIDTHS) -> tuple[PackedExperts, Tensor, Tensor]:
    """A packed layer of random codes; its row widths ``[3, E, r]`` and codes, padded to blocks."""
    g = torch.Generator().manual_seed(seed)
    e, r, size = SHAPE.num_experts, SHAPE.rank, SHAPE.intermediate_size
    row_bits = torch.tensor(widths)[torch.randint(len(widths), (3, e, r), generator=g)]
    codes = torch.randint(2**16, (3, e, r, row_codec.padded(size)), generator=g) % 2 ** row_bits[..., None]
    scale_codes = torch.randint(SCALE_LEVELS, (3, e, r), generator=g, dtype=torch.uint8)
    low, step = torch.randn(2, 3, r, generator=g).half()
    scale_grid = ScaleGrid(low, step.abs() / 4)
    words = [layout.pack_expert(codes[f, i], row_bits[f, i]) for f in range(3) for i in range(e)]
    basis, scales = layout.pack_basis(quantize_basis(torch.randn(7, 16, dtype=torch.double), 4, 16))
    packed = PackedExperts(
        layout.pack_row_codes(row_bits, scale_codes, widths),
        layout.pack_scale_grid(scale_grid),
        torch.cat(words),
        *(basis, scales, basis, scales),
    )
    return packed, row_bits, codes


def half(bits: int) -> float:
    """The float16 that an int16 holds."""
    return struct.unpack("<e", struct.pack("<h", bits))[0]


def read_by_hand(
    packed: PackedExperts, widths: tuple[int, ...], size: int, grid: str
) -> list[list[dict[int, list[float]]]]:
    """``[factor][expert][rank index]`` -> values, from the texts of ``layout`` and ``trellis`` alone."""
    words = iter(word & 0xFFFFFFFF for word in packed.payload.tolist())
    scale_grid = packed.scale_grid.tolist()
    factors = []
    for factor, experts in enumerate(packed.row_codes.tolist()):
        factors.append([])
        for row_codes in experts:
            bits_of = [widths[code >> 5] for code in row_codes]
            rows = {}
            for k in sorted(range(len(row_codes)), key=lambda k, b=bits_of: (-b[k], k)):
                if bits_of[k] == 0:
                    continue
                low, step = (half(part[k]) for part in scale_grid[factor])
                scale = 2 ** (low + (row_codes[k] & 31) * step)
                rows[k] = read_row(words, bits_of[k], size, scale, grid)
            factors[-1].append(rows)
    assert next(words, None) is None, "payload is longer than the row codes say"
    return factors


def read_row(words, bits: int, size: int, scale: float, grid: str) -> list[float]:
    values: list[float] = []
    for _ in range(-(-size // 32)):
        block = sum(next(words) << 32 * i for i in range(bits))
        codes = [block >> i * bits & (2**bits - 1) for i in range(32)]
        if grid == "trellis" and bits <= 4:
            values += [scale * value for value in trellis_values(codes, bits)]
        else:
            values += [scale * STEP[bits] * (code - (2**bits - 1) / 2) for code in codes]
    return values[:size]


def trellis_values(codes: list[int], bits: int) -> list[float]:
    """Value i is that of the 8 bits before bit (i + 1) * bits of the block's ring of bits."""
    ring = [code >> position & 1 for code in codes for position in range(bits)]
    values = []
    for end in range(bits, len(ring) + 1, bits):
        window = sum(ring[(end - 8 + position) % len(ring)] << position for position in range(8))
        values.append(int(TABLES[bits][window]) / 32)
    return values


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_trellis_tables_stay_as_they_are(bits: int) -> None:
    """Guards existing checkpoints: they hold no tables, the format does."""
    assert hashlib.sha256(TABLES[bits].tobytes()).hexdigest() == TABLE_SHA256[bits]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", GRIDS)
def test_a_second_reader_of_the_documented_layout_agrees(seed: int, grid: str) -> None:
    """Guards the format: row order, offsets, bit order, scales, trellis. float32 exp2: 1e-6."""
    packed, row_bits, codes = random_layer(seed)
    size = SHAPE.intermediate_size
    expected = read_by_hand(packed, ALL_WIDTHS, size, grid)
    index = layout.index_rows(packed.row_codes, ALL_WIDTHS, SHAPE)
    scales = layout.row_scales(packed.row_codes, packed.scale_grid)
    assert index.words == packed.payload.numel() == int(row_bits.sum()) * SHAPE.blocks
    assert torch.equal(layout.row_widths(packed.row_codes, ALL_WIDTHS), row_bits)
    for factor in range(3):
        for expert in range(SHAPE.num_experts):
            rows, order = layout.unpack_rows(packed.payload, index, scales, factor, expert, size, grid)
            wanted = expected[factor][expert]
            assert order.tolist() == list(wanted)
            torch.testing.assert_close(rows, torch.tensor(list(wanted.values())), rtol=1e-5, atol=0)
            width, scale = row_bits[factor, expert, order], scales[factor, expert, order]
            assert torch.equal(rows, row_codec.decode(codes[factor, expert, order], scale, width, size, grid))


def test_dropped_rows_are_absent() -> None:
    """An expert with all rows at width 0 stores nothing and unpacks to no rows."""
    row_bits = torch.zeros(3, 3, 7, dtype=torch.int64)
    row_bits[:, 2, 4] = 3
    codes = random_codes(7, 64, 3, 0)
    words = [layout.pack_expert(codes, row_bits[f, e]) for f in range(3) for e in range(3)]
    assert [len(w) for w in words] == [0, 0, 2 * 3] * 3
    row_codes = layout.pack_row_codes(row_bits, torch.zeros(3, 3, 7, dtype=torch.uint8), (0, 3))
    index = layout.index_rows(row_codes, (0, 3), SHAPE)
    scales = torch.ones(3, 3, 7)
    for expert, count in ((0, 0), (1, 0), (2, 1)):
        rows, order = layout.unpack_rows(torch.cat(words), index, scales, 1, expert, 40, "trellis")
        assert rows.shape == (count, 40)
        assert len(order) == count
    wanted = [value for block in codes[4].view(2, 32).tolist() for value in trellis_values(block, 3)]
    assert torch.equal(rows[0], torch.tensor(wanted[:40]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_windows_are_read_straight_from_the_words(bits: int) -> None:
    """Guards the short cut of the decoder: windows of packed codes, across words and around the ring."""
    codes = random_codes(5, 96, bits, bits)
    read = bit_strings.unpack_windows(bit_strings.pack_codes(codes, bits), bits, 96)
    assert torch.equal(read, trellis.windows(codes, bits))
    assert torch.equal(
        bit_strings.unpack_windows(bit_strings.pack_codes(codes, bits), bits, 40), read[:, :40]
    )


@pytest.mark.parametrize("widths", [(0, 2, 4), (1, 3), (16,), ALL_WIDTHS])
def test_rows_of_one_expert_do_not_depend_on_the_others(widths: tuple[int, ...]) -> None:
    """Guards expert parallelism: experts may be kept, left out and reordered one by one."""
    packed = random_layer(5, widths)[0]
    index = layout.index_rows(packed.row_codes, widths, SHAPE)
    turned = layout.index_rows(packed.row_codes.flip(1), widths, SHAPE)
    assert torch.equal(turned.order, index.order.flip(1))
    assert turned.counts == [experts[::-1] for experts in index.counts]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("columns", [32, 48, 96])
def test_bases_survive_packing(bits: int, columns: int) -> None:
    """What is unpacked is bitwise what the factors were computed with, also from a transposed matrix."""
    given = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.double))[0]
    for basis in (quantize_basis(given, bits, 16), quantize_basis(given.T, bits, 16)):
        words, scales = layout.pack_basis(basis)
        assert words.is_contiguous()
        assert scales.is_contiguous()
        assert torch.equal(layout.unpack_basis(words, scales, bits, columns), basis.dequantize())


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("hidden", "group_size"), [(32, 32), (64, 16), (48, 16)])
@pytest.mark.parametrize("input_bases", [1, 2])
def test_counted_bits_are_stored_bits(bits: int, hidden: int, group_size: int, input_bases: int) -> None:
    """Guards the counted budget: fixed parts and row sizes add up to the bytes of the tensors,
    which have the dtypes and shapes of the format's table."""
    shape = LayerShape(num_experts=2, hidden_size=hidden, intermediate_size=40)
    given = torch.randn(input_bases * hidden, hidden, dtype=torch.double)
    row_bits = torch.tensor(ALL_WIDTHS)[torch.randint(8, (3, 2, hidden))]
    zeros = torch.zeros(3, 2, hidden)
    grid = ScaleGrid(torch.zeros(3, hidden).half(), torch.zeros(3, hidden).half())
    read, write = (
        layout.pack_basis(quantize_basis(basis, bits, group_size)) for basis in (given, given[:hidden])
    )
    codes = torch.zeros(hidden, 40)
    packed = PackedExperts(
        layout.pack_row_codes(row_bits, zeros.to(torch.uint8), ALL_WIDTHS),
        layout.pack_scale_grid(grid),
        torch.cat([layout.pack_expert(codes, bits_) for bits_ in row_bits.flatten(0, 1)]),
        *(*read, *write),
    )
    words = int(row_bits.sum()) * shape.blocks
    spec = PackedSpec(shape, ALL_WIDTHS, bits, group_size, input_bases, words, "trellis")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors()} == spec.tensors()
    size_of = dict(zip(ALL_WIDTHS, row_sizes(shape, ALL_WIDTHS), strict=True))
    payload = sum(size_of[width] for width in row_bits.flatten().tolist())
    fixed = layout.fixed_bits(shape, bits, group_size, input_bases)
    assert packed.stored_bits() == payload + sum(fixed.values())
