"""One layer of the method authors' format against a writer of that format: bit-exact, or refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from upstream_support import (
    Row,
    UpstreamLayer,
    decode_value,
    encode_marlin,
    encode_projection,
    random_row,
    random_upstream_layer,
)

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec import layout, tiled
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.sharding import Shard, shard_shape, slice_packed, split_blocks
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.commands.import_upstream.bases import read_basis
from bitsmoe_plugin.commands.import_upstream.files import UpstreamFiles, assign
from bitsmoe_plugin.commands.import_upstream.layer import ConvertedLayer, convert_layer
from bitsmoe_plugin.commands.import_upstream.rows import REQUIRED, WIDTHS, read_projection
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.cpu_layer import CpuLayer
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer
from bitsmoe_plugin.runtime.with_originals import WithOriginals

MOE = "model.layers.0.mlp"


def numbered_rows(seed: int, size: int, widths: list[int], extreme: bool = False) -> list[Row]:
    """A row for each of ``widths``, at a random distinct rank; 0 stores none."""
    rng = random.Random(seed)
    ranks = rng.sample(range(len(widths)), len(widths))
    pairs = [(rank, bits) for rank, bits in zip(ranks, widths, strict=True) if bits]
    return [random_row(rng, rank, bits, size, extreme) for rank, bits in pairs]


def read(buffers: dict[str, Tensor], rank: int, size: int) -> Any:
    """``read_projection`` of encoded buffers."""
    return read_projection(
        "e.gate", {k.removeprefix("gate_"): v for k, v in buffers.items()}, rank=rank, size=size
    )


def convert(layer: UpstreamLayer, shape: LayerShape, folder: Path) -> ConvertedLayer:
    """The layer through a file."""
    tensors = {f"{MOE}.{name}": tensor.contiguous() for name, tensor in layer.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    with UpstreamFiles.open(folder) as files:
        (found,), others = assign(files, {f"{MOE}.experts": shape.num_experts})
        assert others == []
        return convert_layer(files, found, shape)


def spec_of(converted: ConvertedLayer, shape: LayerShape) -> PackedSpec:
    packed = converted.packed
    assert packed.row_gains is not None
    return PackedSpec(
        shape, ALL_WIDTHS, converted.basis_bits, 128, 2, packed.payload.numel(), "tiled",
        kept=converted.kept, original_dtype="float16", stored_rows=packed.row_gains.numel(),
    )  # fmt: skip


def assert_rows_are(packed: PackedExperts, shape: LayerShape, layer: UpstreamLayer) -> None:
    """Every packed row has exactly the values of the row that it was made of, and there are no others."""
    index = layout.index_rows(packed.row_codes, ALL_WIDTHS, shape)
    for factor in range(3):
        for expert in range(shape.num_experts):
            values, ranks = layout.unpack_tiled_rows(packed, index, factor, expert, shape.intermediate_size)
            wanted = {row.rank: row.values() for row in layer.rows[factor][expert] or ()}
            assert sorted(ranks.tolist()) == sorted(wanted)
            for rank, row in zip(ranks.tolist(), values, strict=True):
                assert torch.equal(row, torch.tensor(wanted[rank])), (factor, expert, rank)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("extreme", [False, True])
def test_the_writer_is_read_back_by_the_kernels_addresses(bits: int, extreme: bool) -> None:
    """Judges the writer itself: metadata, stages, tiles and bit planes, with slabs and tiles not full."""
    size, widths = 160, [bits] * 83
    rows = numbered_rows(bits, size, widths, extreme)
    buffers = encode_projection(rows, size, 83, "gate")
    rng = random.Random(0)
    for _ in range(200):
        row, neuron = rng.randrange(83), rng.randrange(size)
        assert decode_value(buffers, "gate", row, neuron) == rows[row].values()[neuron]


@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.sampled_from((0, *WIDTHS)), min_size=1, max_size=40),
    groups=st.integers(1, 9),
    extreme=st.booleans(),
)
def test_every_value_is_read_exactly(seed: int, widths: list[int], groups: int, extreme: bool) -> None:
    """Guards codes, scales and gains of any mixture of widths, odd numbers of rows, and ends of ranges."""
    size = 32 * groups
    rows = numbered_rows(seed, size, widths, extreme)
    found = read(encode_projection(rows, size, len(widths), "gate"), len(widths), size)
    values = {row.rank: row.values() for row in rows}
    assert sorted(found.ranks.tolist()) == sorted(values)
    for i, (rank, width) in enumerate(zip(found.ranks.tolist(), found.bits.tolist(), strict=True)):
        row = tiled.decode(found.codes[i], width, found.scales[i]) * found.gains[i].float()
        assert torch.equal(row, torch.tensor(values[rank]))


@pytest.mark.parametrize("bits", WIDTHS)
def test_slabs_and_stages_that_are_not_full(bits: int) -> None:
    """Guards the order of more rows than a slab holds, the last slab with an odd last stage."""
    rows = numbered_rows(1, 160, [bits] * 83)
    found = read(encode_projection(rows, 160, 83, "gate"), 83, 160)
    for i, row in enumerate(rows):
        values = tiled.decode(found.codes[i], bits, found.scales[i]) * found.gains[i].float()
        assert torch.equal(values, torch.tensor(row.values()))


@pytest.mark.parametrize(("basis_bits", "hidden", "ranks"), [
    (16, 40, (40, 40, 40)), (16, 40, (33, 40, 17)), (8, 128, (128, 64, 128)), (8, 256, (192, 256, 128)),
])  # fmt: skip
def test_a_layer_converts_exactly(
    basis_bits: int, hidden: int, ranks: tuple[int, int, int], tmp_path: Path
) -> None:
    """Guards row order, offsets and the bases' layout, with ranks below the hidden size, and the spec."""
    widths = (0, 1, 2, 3, 4, 6, 8, 16) if basis_bits == 16 else (0, 2)
    layer = random_upstream_layer(
        random.Random(hidden), 3, hidden, 160, ranks, basis_bits=basis_bits, widths=widths, dense=(1,)
    )
    shape = LayerShape(3, hidden, 160)
    converted = convert(layer, shape, tmp_path)
    packed, spec = converted.packed, spec_of(converted, shape)
    assert_rows_are(packed, shape, layer)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors()} == spec.tensors()
    spec.check_rows("layer", packed.row_codes)
    read_in, read_out = (
        layout.unpack_basis(codes, scales, basis_bits, hidden, "tiled")
        for codes, scales in (
            (packed.input_basis, packed.input_scales),
            (packed.output_basis, packed.output_scales),
        )
    )
    for found, basis in zip((*read_in.split(hidden), read_out), layer.bases, strict=True):
        assert torch.equal(found[: basis.shape[0], : basis.shape[1]], basis)
        assert float(found.abs().sum()) == float(found[: basis.shape[0], : basis.shape[1]].abs().sum())
    assert converted.kept == (1,)
    assert packed.kept_input is not None
    assert torch.equal(spec.original(packed.kept_input)[0, 1], layer.dense[1][1])


def by_hand(packed: PackedExperts, size: int) -> list[list[dict[int, list[float]]]]:
    """``[factor][expert]`` -> rank -> values, from the texts of ``layout`` and ``tiled`` alone."""
    words = iter(word & 0xFFFFFFFF for word in packed.payload.tolist())
    assert packed.tile_scales is not None
    assert packed.row_gains is not None
    scales = iter(packed.tile_scales.view(torch.float16).double().tolist())
    gains = iter(packed.row_gains.view(torch.float16).double().tolist())
    found: list[list[dict[int, list[float]]]] = []
    for experts in packed.row_codes.tolist():
        found.append([])
        for row_codes in experts:
            bits = [ALL_WIDTHS[code >> 5] for code in row_codes]
            rows: dict[int, list[float]] = {}
            for k in sorted(range(len(bits)), key=lambda k, b=bits: (-b[k], k)):  # type: ignore[misc]
                if bits[k] == 0:
                    continue
                block = [sum(next(words) << 32 * i for i in range(bits[k])) for _ in range(size // 32)]
                codes = [part >> i * bits[k] & (2 ** bits[k] - 1) for part in block for i in range(32)]
                if bits[k] == 16:
                    q = [struct.unpack("<e", struct.pack("<H", code))[0] for code in codes]
                else:
                    q = [2 * u - 1 if bits[k] == 1 else u - 2 ** (bits[k] - 1) for u in codes]
                row = Row(k, bits[k], q, next(scales), next(gains))
                rows[k] = row.values()
            found[-1].append(rows)
    assert not [*words, *scales, *gains], "there is more than the row codes say"
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_second_reader_of_the_documented_layout_agrees(seed: int, tmp_path: Path) -> None:
    """Guards the format of converted checkpoints: order of rows, scales and gains, bits, kept experts."""
    shape = LayerShape(3, 21, 160)
    layer = random_upstream_layer(random.Random(seed), 3, 21, 160, (21, 20, 19), dense=(seed,))
    read = by_hand(convert(layer, shape, tmp_path).packed, 160)
    for factor in range(3):
        for expert in range(3):
            rows = layer.rows[factor][expert] or ()
            assert read[factor][expert] == {row.rank: row.values() for row in rows}


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_expert_without_rows_in_one_projection_adds_nothing(empty: int, tmp_path: Path) -> None:
    """As in the authors' update, which skips such experts."""
    shape = LayerShape(2, 16, 32)
    layer = random_upstream_layer(random.Random(3), 2, 16, 32, (16, 16, 16), widths=(2, 3))
    prefix = ("gate", "up", "down")[empty]
    for name, tensor in encode_projection([], 32, 16, prefix).items():
        layer.tensors[f"experts.1.{name}"] = tensor
    converted = convert(layer, shape, tmp_path)
    runtime = ReferenceLayer.prepare(spec_of(converted, shape), converted.packed, gating("silu"))
    out = runtime.forward(torch.randn(4, 16), torch.tensor([[0], [1], [1], [0]]), torch.ones(4, 1))
    assert out[[1, 2]].abs().max() == 0
    assert out[[0, 3]].abs().min() > 0


def some_tokens(hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, two of three experts for each, and their weights."""
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(6)])
    return torch.randn(6, hidden), ids, torch.rand(6, 2)


def test_the_reference_computes_with_the_dense_weights(tmp_path: Path) -> None:
    """float32 sums in another order: 1e-5 of the largest output."""
    shape = LayerShape(3, 40, 160)
    layer = random_upstream_layer(random.Random(4), 3, 40, 160, (40, 31, 37), dense=(2,))
    converted = convert(layer, shape, tmp_path)
    spec = spec_of(converted, shape)
    rows = ReferenceLayer.prepare(spec, converted.packed, gating("silu"))
    runtime = WithOriginals(rows, spec, gating("silu"))
    hidden, ids, weights = some_tokens(40)
    wanted = torch.zeros(6, 40)
    for token in range(6):
        for slot in range(2):
            gate, up, down = (layer.weights(f, int(ids[token, slot]), 160) for f in range(3))
            h = torch.nn.functional.silu(gate @ hidden[token]) * (up @ hidden[token])
            wanted[token] += weights[token, slot] * (down @ h)
    # The unpacked expert is computed in its own dtype, float16.
    found = runtime.forward(hidden, ids, weights)
    unpacked = (ids == 2).any(-1)
    scale = float(wanted.abs().max())
    assert torch.allclose(found[~unpacked], wanted[~unpacked], rtol=0, atol=1e-5 * scale)
    assert torch.allclose(found, wanted, rtol=0, atol=5e-3 * scale)
    # Each token alone: offsets of the rows are looked up for the experts that are used.
    alone = [runtime.forward(hidden[i, None], ids[i, None], weights[i, None]) for i in range(6)]
    assert torch.allclose(torch.cat(alone), found, rtol=0, atol=1e-5 * scale)


KERNEL_LAYERS: list[tuple[int, int, dict[str, Any]]] = [
    (160, 40, {"ranks": (40, 31, 37), "dense": (2,)}),
    (384, 128, {"ranks": (128, 64, 128), "basis_bits": 8, "widths": (0, 1, 3, 8)}),
    (2112, 48, {"ranks": (48, 48, 48), "widths": (1, 2)}),  # more than a panel of 2048 inputs
    *((224, 64, {"ranks": (64, 64, 64), "widths": (width,)}) for width in WIDTHS),
]


@pytest.mark.skipif(native.library() is None, reason="the package was installed without a C compiler")
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(("size", "hidden", "options"), KERNEL_LAYERS)
def test_compiled_kernels_agree_with_the_reference(
    size: int, hidden: int, options: dict[str, Any], instructions: str, tmp_path: Path, monkeypatch
) -> None:
    """Of the largest output: 3e-4 (measured 1e-4: inputs are rounded to 16 bits) if the reference does not
    round products of codes and scales either, and 1.5e-3 (measured 4.5e-4) as it is."""
    shape = LayerShape(3, hidden, size)
    ranks = options["ranks"]
    rest = {name: value for name, value in options.items() if name != "ranks"}
    converted = convert(
        random_upstream_layer(random.Random(1), 3, hidden, size, ranks, **rest), shape, tmp_path
    )
    spec, packed, tokens = spec_of(converted, shape), converted.packed, some_tokens(hidden)
    if native.select(instructions) is None:
        pytest.skip(f"this machine has no {instructions}")
    try:
        found = CpuLayer.prepare(spec, packed, gating("silu")).forward(*tokens)
    finally:
        native.select(None)
    reference = ReferenceLayer.prepare(spec, packed, gating("silu"))
    wanted = reference.forward(*tokens)
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 1.5e-3 * scale

    def unrounded(codes: Tensor, width: int, scales: Tensor) -> Tensor:
        each = scales.float().repeat_interleave(tiled.TILE, -1)[..., : codes.shape[-1]]
        return tiled.whole_numbers(codes, width) * each

    monkeypatch.setattr(tiled, "decode", unrounded)
    assert float((found - reference.forward(*tokens)).abs().max()) < 3e-4 * scale


def test_the_fastest_implementation_is_chosen(tmp_path: Path, monkeypatch) -> None:
    """Compiled kernels know the grid; without them there is a warning."""
    shape = LayerShape(2, 16, 32)
    converted = convert(random_upstream_layer(random.Random(0), 2, 16, 32, (16, 16, 16)), shape, tmp_path)
    arguments = spec_of(converted, shape), converted.packed, gating("silu")
    if native.library() is not None:
        assert isinstance(dispatch.prepare(*arguments), CpuLayer)
    monkeypatch.setattr(dispatch, "library", lambda: None)
    with pytest.warns(UserWarning, match="in plain torch"):
        assert isinstance(dispatch.prepare(*arguments), ReferenceLayer)


@pytest.mark.parametrize("size", [128, 256, 384])
def test_shards_are_slices(size: int, tmp_path: Path) -> None:
    """Guards tensor and expert parallel loading: scales and gains go with their rows."""
    shape = LayerShape(3, 24, size)
    layer = random_upstream_layer(random.Random(size), 3, 24, size, (24, 24, 24))
    packed = convert(layer, shape, tmp_path).packed
    parts = size // 128
    for part in range(parts):
        shard = Shard((2, 0), split_blocks("layer", shape, parts, part, unit=tiled.TILE))
        sliced = slice_packed(packed, ALL_WIDTHS, shape, shard)
        local = shard_shape(shape, shard)
        index = layout.index_rows(sliced.row_codes, ALL_WIDTHS, local)
        whole = layout.index_rows(packed.row_codes, ALL_WIDTHS, shape)
        for factor in range(3):
            for position, expert in enumerate(shard.experts):
                rows, order = layout.unpack_tiled_rows(sliced, index, factor, position, 128)
                wanted, same = layout.unpack_tiled_rows(packed, whole, factor, expert, size)
                assert torch.equal(order, same)
                assert torch.equal(rows, wanted[:, 128 * part : 128 * (part + 1)])
    with pytest.raises(ConfigError, match=rf"multiple of {2 * parts}\*128"):
        split_blocks("layer", shape, 2 * parts, 0, unit=tiled.TILE)


@pytest.mark.parametrize(("k", "n"), [(128, 64), (256, 192), (384, 128)])
def test_marlin_tiles_and_scales_are_unpacked(k: int, n: int) -> None:
    """With one group of 128 rows, the kernel's scales are permuted otherwise than with more."""
    codes = torch.randint(256, (k, n), dtype=torch.uint8)
    scales = torch.rand(k // 128, n).half()
    words, stored = encode_marlin(codes, scales)
    basis = read_basis("b", {"qweight": words, "scales": stored}, k, output=False)
    assert torch.equal(basis.codes, codes.T)
    assert basis.scales is not None
    assert torch.equal(basis.scales, scales.T)


def _put(buffer: str, position: tuple[int, ...], value: float):
    def change(buffers: dict[str, Tensor]) -> None:
        tensor = buffers[buffer].to(torch.float64)
        tensor[position] = value
        buffers[buffer] = tensor.to(buffers[buffer].dtype)

    return change


def _retype(buffer: str, dtype: torch.dtype):
    def change(buffers: dict[str, Tensor]) -> None:
        buffers[buffer] = buffers[buffer].to(dtype)

    return change


def _shorten(buffer: str):
    def change(buffers: dict[str, Tensor]) -> None:
        buffers[buffer] = buffers[buffer][:-1].clone()

    return change


def _flatten(buffer: str):
    def change(buffers: dict[str, Tensor]) -> None:
        buffers[buffer] = buffers[buffer].flatten()

    return change


BAD = {
    "slab of a width that is not in the format": (_put("slab_meta_buffer", (0, 0), 5), "5 bits"),
    "slab without rows": (_put("slab_meta_buffer", (0, 1), 0), "slab of 0 rows"),
    "slab that starts at another row": (_put("slab_meta_buffer", (1, 2), 0), "slab_meta_buffer does not"),
    "slab that starts at another tile": (_put("slab_meta_buffer", (1, 3), 0), "slab_meta_buffer does not"),
    "slab of more rows": (_put("slab_meta_buffer", (1, 1), 10), "does not describe"),
    "tile that starts at another word": (_put("tile_meta_buffer", (1, 0), 0), "tile_meta_buffer does not"),
    "tile that starts at another scale": (_put("tile_meta_buffer", (1, 1), 0), "tile_meta_buffer does not"),
    "tile of other neurons": (_put("tile_meta_buffer", (0, 2), 96), "tile_meta_buffer does not"),
    "too few tiles": (_shorten("tile_meta_buffer"), "tile_meta_buffer does not"),
    "metadata of another shape": (_flatten("slab_meta_buffer"), r"\[slabs, 4\]"),
    "metadata of another type": (_retype("slab_meta_buffer", torch.int64), "slab_meta_buffer is torch.int64"),
    "payload too short": (_shorten("payload_buffer"), "payload_buffer is"),
    "payload of another type": (_retype("payload_buffer", torch.int32), "payload_buffer is torch.int32"),
    "scales too short": (_shorten("scale_buffer"), "scale_buffer is"),
    "scales of another type": (_retype("scale_buffer", torch.bfloat16), "scale_buffer is torch.bfloat16"),
    "gains too short": (_shorten("s_buffer"), "s_buffer is"),
    "ranks too short": (_shorten("rank_idx_buffer"), "rank_idx_buffer is"),
    "rank too large": (_put("rank_idx_buffer", (3,), 12), "0 to 12; the basis has rank 12"),
    "rank below zero": (_put("rank_idx_buffer", (3,), -1), "-1 to 11"),
    "rank named twice": (_put("rank_idx_buffer", (2,), 5), "rank_idx_buffer names a row twice"),
    "scale that is no number": (_put("scale_buffer", (20,), float("nan")), "scale_buffer holds values"),
    "infinite scale": (_put("scale_buffer", (20,), float("inf")), "scale_buffer holds values"),
    "scale that overflows": (_put("scale_buffer", (20,), 65504.0), "payload_buffer decodes"),
    "scaled rows of 16 bits": (_put("scale_buffer", (0,), 2.0), "scales rows of 16 bits"),
    "gain that is no number": (_put("s_buffer", (2,), float("nan")), "s_buffer holds values"),
    "infinite value of 16 bits": (_put("payload_buffer", (0,), 0x7C00), "payload_buffer decodes"),
    "other segments": (_put("segments", (0, 2), 1), "segments contradicts"),
    "other indices": (_put("original_indices", (0,), 7), "original_indices contradicts"),
    "other tiles": (_put("groupsize", (), 64), "groupsize contradicts"),
    "rank beyond the basis": (_put("original_rank", (), 99), r"original_rank is \[99\]"),
    "rank below the rows": (_put("original_rank", (), 3), r"original_rank is \[3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_refused_by_name(case: str) -> None:
    """Each would be read as other weights, or past the end."""
    change, message = BAD[case]
    rng = random.Random(0)
    # Slabs of 3 and 9 rows, two tiles, the second not full.
    rows = [random_row(rng, rank, 16, 160) for rank in (0, 5, 2)]
    rows += [random_row(rng, rank, 8, 160) for rank in (1, 3, 4, 6, 7, 8, 9, 10, 11)]
    buffers = encode_projection(rows, 160, 12, "gate")
    plain = {name.removeprefix("gate_"): tensor for name, tensor in buffers.items()}
    read_projection("layer.3.gate", plain, rank=12, size=160)
    change(plain)
    with pytest.raises(CheckpointError, match=r"^layer\.3\.gate_.*" + message) as error:
        read_projection("layer.3.gate", plain, rank=12, size=160)
    assert "\n" not in str(error.value)


def test_implied_buffers_may_be_absent() -> None:
    """One of the authors' two readers does not ask for them."""
    rows = numbered_rows(0, 64, [2, 3, 4])
    buffers = encode_projection(rows, 64, 3, "gate")
    needed = {f"gate_{buffer}": buffers[f"gate_{buffer}"] for buffer in REQUIRED}
    assert torch.equal(read(needed, 3, 64).codes, read(buffers, 3, 64).codes)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"": torch.zeros(5, 7).half()}, r"\[5, 7\]; the model asks for \[r, 8\]"),
        ({"": torch.zeros(9, 8).half()}, "r at most 8"),
        ({"": torch.zeros(0, 8).half()}, "r at most 8"),
        ({"": torch.zeros(8, 8)}, "float32"),
        ({"": torch.full((8, 8), float("nan")).half()}, "not finite"),
        ({"qweight": torch.zeros(8, 256), "scales": torch.zeros(1, 64).half()}, "float32"),
        ({"qweight": torch.zeros(8, 256).int(), "scales": torch.zeros(1, 32).half()}, r"ask for \[8, 128\]"),
        ({"qweight": torch.zeros(8, 256).int(), "scales": torch.zeros(1, 64).half()}, r"\[64, 128\]; the"),
    ],
)
def test_wrong_bases_are_refused_by_name(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match="^moe.basis.*" + message):
        read_basis("moe.basis", tensors, 8, output=False)


def test_a_basis_of_eight_bits_that_overflows_is_refused() -> None:
    words, scales = encode_marlin(torch.zeros(128, 64, dtype=torch.uint8), torch.full((1, 64), 6e4).half())
    with pytest.raises(CheckpointError, match="not finite"):
        read_basis("basis", {"qweight": words, "scales": scales}, 128, output=False)
