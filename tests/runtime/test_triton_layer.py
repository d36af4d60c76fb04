"""The Triton kernels in Triton's interpreter against the float32 reference; on a GPU:
``test_gpu_triton_layer``.

Errors are relative, ||y - reference|| / ||reference||. With float32 inputs and operands both sides
add at most 128 products, in another order, in each of four products one after the other: 128 * 2**-24
= 8e-6 at worst for each, and the square root of that number when signs are random; seen: 5e-7.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitsmoe_plugin.codec import layout, sharding, trellis
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.row_codec import GRIDS
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.presets import ALL_WIDTHS

pytest.importorskip("triton", reason="Triton is published for Linux only")

from triton_support import Inputs, random_inputs, random_layer, random_widths, reference, relative_error

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton import layer as triton_layer
from bitsmoe_plugin.runtime.triton import prefill, rows
from bitsmoe_plugin.runtime.triton.basis import PackedBasis, multiply
from bitsmoe_plugin.runtime.triton.grouping import Tiles, group_pairs
from bitsmoe_plugin.runtime.triton.layer import TritonLayer
from bitsmoe_plugin.runtime.triton.target import INTERPRETER, BlockSizes, Target, Tile

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="compiled kernels do not take tensors on the CPU"
)
FLOAT32 = 1e-5
SHAPE = LayerShape(num_experts=3, hidden_size=48, intermediate_size=40)
DECODE_TOKENS = INTERPRETER.blocks.decode_tokens
DECODE, PREFILL = DECODE_TOKENS, 20
phases = pytest.mark.parametrize("tokens", [DECODE, PREFILL], ids=["decode", "prefill"])


@pytest.fixture(autouse=True)
def _buffers_start_as_nan() -> Iterator[None]:
    """What a kernel fails to write shows, instead of being zero by luck: torch fills ``empty`` tensors."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.zeros(1).new_empty(2).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def check(
    spec: PackedSpec,
    packed: PackedExperts,
    inputs: Inputs,
    activation: str = "silu",
    target: Target | None = None,
) -> None:
    value = TritonLayer.prepare(spec, packed, activation, target).forward(*inputs.tensors())
    wanted = reference(spec, packed, inputs, activation)
    assert value.shape == wanted.shape
    assert value.dtype == wanted.dtype
    assert bool((wanted != 0).any())
    assert relative_error(value, wanted) < FLOAT32


@pytest.mark.parametrize("tokens", [1, DECODE, PREFILL])
@pytest.mark.parametrize(
    ("grid", "bits", "bases"), [("trellis", 4, 1), ("uniform", 8, 2), ("trellis", 16, 2)]
)
def test_mixed_widths_agree_with_the_reference(grid: str, bits: int, bases: int, tokens: int) -> None:
    """Rows of all widths and dropped ones in every expert; every kind of basis; a tail of 8 columns."""
    spec, packed = random_layer(SHAPE, grid=grid, basis_bits=bits, input_bases=bases)
    check(spec, packed, random_inputs(SHAPE, tokens))


@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS + 1])
@pytest.mark.parametrize(
    ("grid", "width"),
    [(grid, w) for grid in GRIDS for w in ALL_WIDTHS if w and (w <= 4 or grid == "uniform")],
)
def test_each_width_agrees_with_the_reference(grid: str, width: int, tokens: int) -> None:
    """Guards against an error in one width that the others drown."""
    shape = replace(SHAPE, hidden_size=32)
    spec, packed = random_layer(shape, (0, width), grid)
    check(spec, packed, random_inputs(shape, tokens, k=1))


@phases
@pytest.mark.parametrize("size", [1, 32, 100])
def test_intermediate_sizes_need_not_be_whole_tiles(size: int, tokens: int) -> None:
    """Guards the padding: its codes are zeros, which decode to values that are not."""
    shape = replace(SHAPE, intermediate_size=size)
    spec, packed = random_layer(shape, (0, 2, 3, 6))
    check(spec, packed, random_inputs(shape, tokens))


@phases
@pytest.mark.parametrize("factors", [(0,), (1, 2), (0, 1, 2)], ids=["gate", "up-down", "all"])
def test_an_expert_may_have_no_rows(factors: tuple[int, ...], tokens: int) -> None:
    """Guards against stale buffers: what no row writes must still be zero."""
    row_bits = random_widths(SHAPE, ALL_WIDTHS)
    row_bits[list(factors), 1] = 0
    spec, packed = random_layer(SHAPE, row_bits=row_bits)
    check(spec, packed, random_inputs(SHAPE, tokens))


@phases
def test_a_layer_may_have_no_rows_at_all(tokens: int) -> None:
    """An empty payload gives zeros, not whatever the buffers held."""
    spec, packed = random_layer(SHAPE, row_bits=torch.zeros(3, 3, 48, dtype=torch.int64))
    value = TritonLayer.prepare(spec, packed, "silu").forward(*random_inputs(SHAPE, tokens).tensors())
    assert torch.equal(value, torch.zeros(tokens, 48))


@phases
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_no_expert_contribute_nothing(dtype: torch.dtype, tokens: int) -> None:
    """Expert parallelism marks experts held elsewhere by -1; a token may have no expert here."""
    spec, packed = random_layer(SHAPE, (0, 2, 4))
    inputs = random_inputs(SHAPE, tokens)
    ids = inputs.ids.to(dtype)
    ids[0], ids[1, 0], ids[2, 1] = -1, -1, SHAPE.num_experts
    inputs = replace(inputs, ids=ids)
    check(spec, packed, inputs)
    nowhere = replace(inputs, ids=torch.full_like(ids, -1))
    value = TritonLayer.prepare(spec, packed, "silu").forward(*nowhere.tensors())
    assert torch.equal(value, torch.zeros(tokens, 48))


@pytest.mark.parametrize("crowded", [1, 128, 129, 150])
def test_experts_may_have_any_number_of_tokens(crowded: int) -> None:
    """Guards the tiles of prefill (128 pairs): an expert without tokens, with one, a full tile, more."""
    spec, packed = random_layer(SHAPE, (0, 2, 4))
    inputs = random_inputs(SHAPE, 150, k=1)
    inputs = replace(inputs, ids=torch.where(torch.arange(150) < crowded, 2, 0)[:, None])
    check(spec, packed, inputs)


def test_tiles_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a tile that writes what is another's: the interpreter runs them in order, and the last
    to write wins."""
    spec, packed = random_layer(SHAPE, (0, 2, 4))
    inputs = random_inputs(SHAPE, PREFILL)

    def backwards(ids: Tensor, experts: int, tile: int, launch: Launcher) -> Tiles:
        tiles = group_pairs(ids, experts, tile, launch)
        return replace(tiles, expert=tiles.expert.flip(0), first=tiles.first.flip(0))

    monkeypatch.setattr(prefill, "group_pairs", backwards)
    check(spec, packed, inputs)


@phases
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(activation: str, tokens: int) -> None:
    """silu is in every other test."""
    spec, packed = random_layer(SHAPE, (0, 4))
    check(spec, packed, random_inputs(SHAPE, tokens), activation)


@pytest.mark.parametrize("tokens", [2, 70])
def test_block_sizes_for_gpus_agree_with_the_reference(tokens: int) -> None:
    """Guards the loops over tiles and the sums over splits, which small shapes in large blocks skip."""
    shape = LayerShape(num_experts=4, hidden_size=160, intermediate_size=200)
    spec, packed = random_layer(shape, (0, 2, 3, 6), group_size=32, input_bases=2)
    small = {size: Tile(16, 2, 1) for size in (16, 32, 64, 128)}
    sizes = BlockSizes(decode_warps=(1, 1), matvec=(4, 8), basis_out=(4, 8), gate_up=small, down=small)
    target = Target(sizes, processors=24, float32_operands=True)
    check(spec, packed, random_inputs(shape, tokens), target=target)


@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("tokens", [5, 70])
def test_bases(bits: int, bases: int, group: int, tokens: int) -> None:
    """Every kernel on its own, several steps of each; 96 columns are not a power of two."""
    shape = LayerShape(1, 96, 32)
    _, packed = random_layer(shape, (0, 1), basis_bits=bits, input_bases=bases, group_size=group)
    basis = PackedBasis.of(packed.input_basis, packed.input_scales, bits, 96, "trellis")
    dense = layout.unpack_basis(packed.input_basis, packed.input_scales, bits, 96).T
    x = torch.randn(tokens, 96)
    for expanded_tokens in (tokens, tokens + 1):
        blocks = BlockSizes(expanded_tokens=expanded_tokens, matmul=(64, 64, 32))
        target = Target(blocks, 1, float32_operands=True)
        value = multiply(x, basis, torch.float32, target, triton_layer.run)
        assert relative_error(value, x @ dense) < FLOAT32


@pytest.mark.parametrize(("bits", "bases", "group"), [(4, 1, 32), (8, 2, 16), (16, 2, 32)])
@pytest.mark.parametrize("processors", [1, 5])
def test_bases_in_decode(bits: int, bases: int, group: int, processors: int) -> None:
    """Several steps of each row; tiles of 16 rows of two tokens, ten in all, for one program, or for five."""
    shape = LayerShape(2, 80, 32)
    spec, packed = random_layer(shape, (0, 2), basis_bits=bits, input_bases=bases, group_size=16)
    target = replace(INTERPRETER, processors=processors, blocks=BlockSizes(matvec=(16, 4), basis_out=(16, 4)))
    check(spec, packed, random_inputs(shape, 2), target=target)


@phases
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_precision_hidden_states(dtype: torch.dtype, limit: float, tokens: int) -> None:
    """Operands are float32 here, so only the result is rounded: the interpreter truncates, which costs
    less than one unit of the last of 11 or 8 bits of precision."""
    spec, packed = random_layer(SHAPE, (0, 2, 4))
    inputs = random_inputs(SHAPE, tokens)
    narrow = replace(inputs, hidden=inputs.hidden.to(dtype), weights=inputs.weights.to(dtype))
    value = TritonLayer.prepare(spec, packed, "silu").forward(*narrow.tensors())
    assert value.dtype == dtype
    wide = replace(narrow, hidden=narrow.hidden.float(), weights=narrow.weights.float())
    assert relative_error(value, reference(spec, packed, wide)) < limit


def test_half_precision_operands() -> None:
    """As on a GPU: coordinates, hidden states and results take part in products as float16. Four roundings
    (truncations here, 2**-11 on average) and products summed in float16, 2**-11 a step, by numpy."""
    spec, packed = random_layer(SHAPE, ALL_WIDTHS)
    inputs = random_inputs(SHAPE, PREFILL)
    narrow = replace(inputs, hidden=inputs.hidden.half())
    target = replace(INTERPRETER, float32_operands=False)
    value = TritonLayer.prepare(spec, packed, "silu", target).forward(*narrow.tensors())
    wide = replace(narrow, hidden=narrow.hidden.float())
    error = relative_error(value, reference(spec, packed, wide))
    assert 1e-5 < error < 5e-3


@phases
def test_shards_add_up_to_the_layer(tokens: int) -> None:
    """Tensor parallel: two halves of every row. Expert parallel: two of the three experts, and the third."""
    shape = replace(SHAPE, intermediate_size=128)
    spec, packed = random_layer(shape, (0, 2, 3))
    inputs = random_inputs(shape, tokens)
    wanted = reference(spec, packed, inputs)
    everyone = tuple(range(3))
    for shards in (
        [sharding.Shard(everyone, (0, 2)), sharding.Shard(everyone, (2, 4))],
        [sharding.Shard((2, 0), (0, 4)), sharding.Shard((1,), (0, 4))],
    ):
        total = torch.zeros_like(wanted)
        for shard in shards:
            part = sharding.slice_packed(packed, spec.widths, shape, shard)
            own = replace(spec, shape=sharding.shard_shape(shape, shard), payload_words=part.payload.numel())
            local = torch.full((3,), -1)
            local[list(shard.experts)] = torch.arange(len(shard.experts))
            total += TritonLayer.prepare(own, part, "silu").forward(
                inputs.hidden, local[inputs.ids], inputs.weights
            )
        assert relative_error(total, wanted) < FLOAT32


def test_many_tokens_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the seams: 50 tokens in chunks of 20, the last of which is smaller."""
    spec, packed = random_layer(SHAPE, (0, 2))
    layer = TritonLayer.prepare(spec, packed, "silu")
    each = prefill.bytes_per_token(layer.state, 2, 50, torch.float32, layer.target)
    monkeypatch.setattr(triton_layer, "PREFILL_BYTES", 20 * each)
    check(spec, packed, random_inputs(SHAPE, 50))


@phases
def test_inputs_may_be_views(tokens: int) -> None:
    """Guards against kernels that take strided tensors for dense ones."""
    spec, packed = random_layer(SHAPE, (0, 2))
    inputs = random_inputs(SHAPE, tokens)
    check(spec, packed, Inputs(*(t.T.contiguous().T for t in inputs.tensors())))


def test_no_tokens() -> None:
    """vLLM's idle ranks call with nothing."""
    spec, packed = random_layer(SHAPE, (0, 2))
    value = TritonLayer.prepare(spec, packed, "silu").forward(*random_inputs(SHAPE, 0).tensors())
    assert value.shape == (0, 48)


class ForbidHostSync(TorchDispatchMode):
    """Refuses every operation whose result the host must wait for on a GPU."""

    waiting = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select", "repeat_interleave")

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        assert not any(name in str(func) for name in self.waiting), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


LAUNCHES = {
    DECODE: ["scaled_matvec_kernel", "gate_up_kernel", "output_kernel"],
    PREFILL: [
        *("expand_kernel", "group_kernel", "scale_kernel", "grouped_gate_up_kernel", "grouped_down_kernel"),
        *("combine_kernel", "expand_kernel"),
    ],
}
"""By number of tokens; in prefill two products of torch come after the bases are expanded."""


@phases
def test_launches_do_not_depend_on_the_values(tokens: int) -> None:
    """A CUDA graph replays the launches of one routing for all: no host sync, the same grids."""
    spec, packed = random_layer(SHAPE, (0, 2, 4))
    layer = TritonLayer.prepare(spec, packed, "silu")
    inputs = random_inputs(SHAPE, tokens)
    grids = []
    for ids in (inputs.ids, torch.full_like(inputs.ids, -1), torch.zeros_like(inputs.ids)):
        launches: list[Launch] = []
        with ForbidHostSync():
            layer.forward(inputs.hidden, ids, inputs.weights, launches.append)
        grids.append([(launch.kernel.__name__, launch.launch_grid, launch.constants) for launch in launches])
    assert grids[0] == grids[1] == grids[2]
    assert [name for name, *_ in grids[0]] == LAUNCHES[tokens]


@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_pair_tables_hold_both_values(bits: int) -> None:
    """Against ``trellis.decode`` of random codes: entry of 8 + bits bits -> values i and i + 1, exactly."""
    codes = torch.randint(2**bits, (64,))
    ring = [int(code) >> place & 1 for code in codes[:32] for place in range(bits)]
    offset = 512 * (2 ** (bits - 1) - 1)
    pairs = rows.pair_tables().view(torch.bfloat16).view(-1, 2).float()
    wanted = trellis.decode(codes[None, :32], bits)[0]
    for i in range(0, 32, 2):
        window = sum(ring[((i + 1) * bits - 8 + p) % len(ring)] << p for p in range(8 + bits))
        assert torch.equal(pairs[offset + window], wanted[i : i + 2])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tile", [1, 4, 64])
def test_every_pair_is_in_one_tile_of_its_expert(seed: int, tile: int) -> None:
    """Guards the launch over an upper bound of tiles: none is missing, none has two experts."""
    experts = 6
    ids = torch.randint(-1, experts + 1, (17, 3), generator=torch.Generator().manual_seed(seed))
    ids[ids == 3] = 2
    tiles = group_pairs(ids, experts, tile, triton_layer.run)
    seen = []
    for expert, first in zip(tiles.expert.tolist(), tiles.first.tolist(), strict=True):
        if expert < experts:
            pairs = tiles.pairs[first : min(first + tile, int(tiles.ends[expert]))].tolist()
            assert pairs
            assert all(int(ids.flatten()[pair]) == expert for pair in pairs)
            seen += pairs
    assert (
        sorted(seen)
        == torch.where((ids >= 0) & (ids < experts))[0]
        .new_tensor([i for i, e in enumerate(ids.flatten().tolist()) if 0 <= e < experts])
        .tolist()
    )


def test_bad_arguments_are_refused() -> None:
    """Errors name what was given and what is possible."""
    spec, packed = random_layer(SHAPE, (0, 2))
    with pytest.raises(ConfigError, match="'elu' are not supported; supported: silu, gelu, gelu_tanh"):
        TritonLayer.prepare(spec, packed, "elu")
    inputs = random_inputs(SHAPE, 1)
    with pytest.raises(ConfigError, match="float64"):
        TritonLayer.prepare(spec, packed, "silu").forward(inputs.hidden.double(), inputs.ids, inputs.weights)
