"""Slicing of packed layers against slicing of unpacked ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_plugin.codec import layout, row_codec
from bitsmoe_plugin.codec.basis import quantize_basis
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.codec.sharding import Shard, local_experts, shard_shape, slice_packed, split_blocks, whole
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

SHAPE = LayerShape(num_experts=4, hidden_size=32, intermediate_size=192)


def random_packed(seed: int, shape: LayerShape = SHAPE) -> PackedExperts:
    """A layer of random words: nothing here depends on how values are coded inside a block."""
    g = torch.Generator().manual_seed(seed)
    e, r = shape.num_experts, shape.rank
    codes = torch.randint(len(ALL_WIDTHS) * SCALE_LEVELS, (3, e, r), generator=g).to(torch.uint8)
    words = layout.index_rows(codes, ALL_WIDTHS, shape).words
    payload = torch.randint(-(2**31), 2**31, (words,), generator=g).to(torch.int32)
    grid = (torch.randn(3, 2, r, generator=g) / 16).half().view(torch.int16)
    bases = [
        layout.pack_basis(quantize_basis(torch.randn(r, r, generator=g, dtype=torch.double), 4, 32))
        for _ in range(2)
    ]
    return PackedExperts(codes, grid, payload, *bases[0], *bases[1])


def spec_of(packed: PackedExperts, shape: LayerShape, grid: str) -> PackedSpec:
    """Sizes of a layer of ``random_packed``."""
    return PackedSpec(shape, ALL_WIDTHS, 4, 32, 1, packed.payload.numel(), grid)


def unpack(packed: PackedExperts, shape: LayerShape, grid: str) -> list[list[tuple[Tensor, Tensor]]]:
    """``[factor][expert]`` -> (rows, rank indices)."""
    index = layout.index_rows(packed.row_codes, ALL_WIDTHS, shape)
    scales = layout.row_scales(packed.row_codes, packed.scale_grid)
    return [
        [
            layout.unpack_rows(packed.payload, index, scales, factor, expert, shape.intermediate_size, grid)
            for expert in range(shape.num_experts)
        ]
        for factor in range(3)
    ]


@given(
    seed=st.integers(0, 2**31),
    experts=st.lists(st.integers(0, 3), unique=True, min_size=1),
    first=st.integers(0, 5),
    blocks=st.integers(1, 6),
    grid=st.sampled_from(row_codec.GRIDS),
)
def test_a_shard_unpacks_to_the_slice_of_the_layer(
    seed: int, experts: list[int], first: int, blocks: int, grid: str
) -> None:
    """Guards every way to cut: experts in any order, any range of blocks, widths that are absent."""
    shard = Shard(tuple(experts), (first, min(first + blocks, SHAPE.blocks)))
    packed = random_packed(seed)
    sliced = slice_packed(packed, ALL_WIDTHS, SHAPE, shard)
    columns = slice(32 * first, 32 * shard.blocks[1])
    pieces = unpack(sliced, shard_shape(SHAPE, shard), grid)
    originals = unpack(packed, SHAPE, grid)
    for factor in range(3):
        for local, expert in enumerate(experts):
            rows, order = originals[factor][expert]
            assert torch.equal(pieces[factor][local][0], rows[:, columns])
            assert torch.equal(pieces[factor][local][1], order)


def test_the_whole_layer_is_a_shard_of_itself() -> None:
    """Also with a last block that is not full, which cannot be split but must load."""
    shape = LayerShape(num_experts=3, hidden_size=32, intermediate_size=40)
    packed = random_packed(1, shape)
    sliced = slice_packed(packed, ALL_WIDTHS, shape, whole(shape))
    assert shard_shape(shape, whole(shape)) == shape
    for (name, before), (_, after) in zip(packed.tensors(), sliced.tensors(), strict=True):
        assert torch.equal(before, after), name
        assert before.data_ptr() != after.data_ptr() or before.numel() == 0, f"{name} still maps the file"


def test_shards_have_the_sizes_that_the_config_predicts() -> None:
    sliced = slice_packed(random_packed(2), ALL_WIDTHS, SHAPE, Shard((1, 3), (3, 6)))
    shape = LayerShape(2, 32, 96)
    words = layout.index_rows(sliced.row_codes, ALL_WIDTHS, shape).words
    assert sliced.payload.numel() == words
    for name, wanted in spec_of(sliced, shape, "trellis").tensors().items():
        tensor = getattr(sliced, name.removeprefix("bitsmoe_"))
        assert (tensor.dtype, tuple(tensor.shape)) == wanted


def _layer(packed: PackedExperts, shape: LayerShape) -> ReferenceLayer:
    return ReferenceLayer.prepare(spec_of(packed, shape, "trellis"), packed, gating("silu"))


@pytest.mark.parametrize("tokens", [1, 5])
def test_outputs_of_the_shards_add_up(tokens: int) -> None:
    """Two halves of the rows (tensor parallel) and two halves of the experts (expert parallel) against
    the whole layer; float32 sums in another order, hence 1e-4 of the largest output."""
    packed = random_packed(3)
    hidden, weights = torch.randn(tokens, 32), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]).to(torch.int32)
    wanted = _layer(packed, SHAPE).forward(hidden, ids, weights)
    everything = tuple(range(4))
    rows = [Shard(everything, split_blocks("layer", SHAPE, 2, part)) for part in range(2)]
    experts = [Shard((0, 2), (0, 6)), Shard((1, 3), (0, 6))]
    for shards in (rows, experts):
        total = torch.zeros_like(wanted)
        for shard in shards:
            local = torch.tensor([shard.experts.index(e) if e in shard.experts else -1 for e in range(4)])
            piece = _layer(slice_packed(packed, ALL_WIDTHS, SHAPE, shard), shard_shape(SHAPE, shard))
            total += piece.forward(hidden, local[ids.long()], weights)
        assert torch.allclose(total, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_tokens_that_chose_no_held_expert_add_nothing() -> None:
    layer = _layer(random_packed(4), SHAPE)
    out = layer.forward(torch.randn(3, 32), torch.full((3, 2), -1), torch.rand(3, 2))
    assert torch.equal(out, torch.zeros(3, 32))


def test_a_split_that_cannot_be_made_names_the_numbers_and_the_way_out() -> None:
    shape = LayerShape(8, 2048, 768)
    with pytest.raises(ConfigError) as error:
        split_blocks("model.layers.3.mlp.experts", shape, 5, 0)
    for part in ("model.layers.3.mlp.experts", "768", "5*32", "1, 2, 3, 4, 6, 8, 12, 24", "expert-parallel"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="Use 1, or expert parallelism"):
        split_blocks("layer", LayerShape(8, 64, 40), 2, 0)


def test_an_activation_without_an_implementation_is_refused() -> None:
    with pytest.raises(ConfigError, match="swigluoai"):
        gating("swigluoai")


def test_local_experts_follow_the_map() -> None:
    assert local_experts(None, 3) == (0, 1, 2)
    assert local_experts(torch.tensor([-1, 1, -1, 0]), 4) == (3, 1)
