"""Which kernels compute how many tokens, and that all of them agree with the float32 reference.

In Triton's interpreter, as ``test_triton_layer``, whose limits of errors hold here too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

pytest.importorskip("triton", reason="Triton is published for Linux only")

from triton_support import Inputs, random_inputs, random_layer, random_widths, reference, relative_error

from bitsmoe_plugin.base.triton_launch import Launch, run
from bitsmoe_plugin.runtime.triton import layer as triton_layer
from bitsmoe_plugin.runtime.triton.compile import empty_layer
from bitsmoe_plugin.runtime.triton.expanded import experts_at_once, scratch_bytes
from bitsmoe_plugin.runtime.triton.layer import TritonLayer
from bitsmoe_plugin.runtime.triton.prefill import bytes_per_token
from bitsmoe_plugin.runtime.triton.target import (
    INTERPRETER,
    BlockSizes,
    DenseTile,
    Target,
    Tile,
    scratch_bytes_wanted,
)

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="compiled kernels do not take tensors on the CPU"
)
FLOAT32 = 1e-5
SHAPE = LayerShape(num_experts=5, hidden_size=48, intermediate_size=40)
GROUPED = replace(INTERPRETER, scratch_bytes=0)
EXPANDED = replace(INTERPRETER, blocks=replace(INTERPRETER.blocks, decode_tokens=0, pairs_per_expert=0))
designs = pytest.mark.parametrize("target", [GROUPED, EXPANDED], ids=["grouped", "expanded"])
H100 = Target(BlockSizes(), 132)


@pytest.fixture(autouse=True)
def _buffers_start_as_nan() -> Iterator[None]:
    """What a kernel fails to write shows: torch fills ``empty`` tensors."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(spec: PackedSpec, packed: PackedExperts, inputs: Inputs, target: Target) -> None:
    value = TritonLayer.prepare(spec, packed, "silu", target).forward(*inputs.tensors())
    wanted = reference(spec, packed, inputs)
    assert bool((wanted != 0).any())
    assert relative_error(value, wanted) < FLOAT32


def kernels(layer: TritonLayer, tokens: int, slots: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    hidden = torch.empty(tokens, layer.input_basis.columns, dtype=dtype, device="meta")
    ids = torch.empty(tokens, slots, dtype=torch.int32, device="meta")
    recorded: list[Launch] = []
    layer.forward(hidden, ids, ids.float(), recorded.append)
    return recorded


def test_sizes_of_tiles_follow_from_the_pairs_per_expert() -> None:
    """Qwen3-30B-A3B: 128 experts, 8 per token. Twice the average, so that most experts have one tile."""
    sizes = {tokens: H100.blocks.pairs_per_tile(8 * tokens, 128) for tokens in (4, 128, 129, 512, 513, 4096)}
    assert sizes == {4: 16, 128: 16, 129: 32, 512: 64, 513: 128, 4096: 128}


@pytest.mark.parametrize(
    ("tokens", "dtype", "first", "number"),
    [
        (1, torch.bfloat16, "scaled_matvec_kernel", 3),
        (3, torch.bfloat16, "scaled_matvec_kernel", 3),
        (4, torch.bfloat16, "expand_kernel", 7),
        (4, torch.float32, "matmul_kernel", 7),
        (4096, torch.float16, "expand_kernel", 7),
        (4097, torch.float16, "expand_kernel", 3 + 4 * 2 + 1),
        (4097, torch.float32, "matmul_kernel", 7),
    ],
)
def test_launches_of_a_layer(tokens: int, dtype: torch.dtype, first: str, number: int) -> None:
    """The regimes begin where the sizes say. Sixteen experts, one per token; 4097 tokens are more than 256
    for each, and half of the experts fit into the scratch buffer."""
    shape = LayerShape(num_experts=16, hidden_size=64, intermediate_size=64)
    spec, packed = random_layer(shape, (0, 2))
    target = replace(H100, scratch_bytes=2 * 64 * 64 * 2 * 8)
    launches = kernels(TritonLayer.prepare(spec, packed, "silu", target), tokens, 1, dtype)
    assert launches[0].kernel.__name__ == first
    assert len(launches) == number


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("hidden", [32, 2048, 7168])
@pytest.mark.parametrize("processors", [1, 7, 132])
def test_programs_that_wait_leave_room(hidden: int, tokens: int, processors: int) -> None:
    """Guards against a GPU that hangs: what waits for down, were it all started first, must not take the
    places of down's programs, of which each processor has two at least. All that wait have work to do."""
    sizes = BlockSizes(decode_tokens=16)
    spec = PackedSpec(LayerShape(2, hidden, 32), (0, 2), 4, 32, 1, payload_words=0, grid="trellis")
    layer = TritonLayer.prepare(spec, empty_layer(spec), "silu", Target(sizes, processors))
    output = kernels(layer, tokens, 2)[-1]
    down = output.arguments["pairs"] * output.arguments["splits"]
    assert output.num_warps == 4
    tiles = tokens * -(-hidden // output.constants["BASIS_ROWS"])
    assert 1 <= output.launch_grid[0] - down <= min(processors, tiles)


def test_launches_can_be_replayed() -> None:
    """As in a CUDA graph, with other states and another routing: guards against a count of programs that does
    not start again."""
    spec, packed = random_layer(SHAPE, (0, 2, 3))
    layer = TritonLayer.prepare(spec, packed, "silu")
    first, then = random_inputs(SHAPE, 2), random_inputs(SHAPE, 2, seed=1)
    launches: list[Launch] = []

    def record(launch: Launch) -> None:
        launches.append(launch)
        run(launch)

    out = layer.forward(*first.tensors(), record)
    for given, value in zip(first.tensors(), then.tensors(), strict=True):
        given.copy_(value)
    out.fill_(float("nan"))
    for launch in launches:
        run(launch)
    assert torch.equal(out, layer.forward(*then.tensors()))
    assert relative_error(out, reference(spec, packed, then)) < FLOAT32


@pytest.mark.parametrize(("tokens", "expanding"), [(257, [257]), (300, [270]), (520, [260, 260])])
def test_chunks_do_not_leave_the_regime(
    tokens: int, expanding: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 270 tokens at once; more than 256 expand the one expert. 300 are 270 and 30, not twice 150, for
    which rows would be decoded for every tile."""
    spec, packed = random_layer(LayerShape(1, 64, 64), (0, 2))
    layer = TritonLayer.prepare(spec, packed, "silu", H100)
    each = bytes_per_token(layer.state, 1, tokens, torch.bfloat16, H100)
    monkeypatch.setattr(triton_layer, "PREFILL_BYTES", 270 * each)
    launches = kernels(layer, tokens, 1)
    sizes = [
        len(launch.arguments["z"]) for launch in launches if launch.kernel.__name__ == "dense_gate_up_kernel"
    ]
    assert sizes == expanding


def test_the_scratch_buffer_is_as_large_as_it_may_be() -> None:
    """And holds one expert at least; chunks are alike."""
    spec, packed = random_layer(SHAPE, (0, 2))
    state = TritonLayer.prepare(spec, packed, "silu").state
    one = 2 * 48 * 64 * 2
    for most, experts in ((1, 1), (2 * one, 2), (3 * one, 3), (4 * one + 1, 3), (5 * one, 5), (2**30, 5)):
        target = replace(H100, scratch_bytes=most)
        assert experts_at_once(state, torch.bfloat16, target) == experts
        assert scratch_bytes(state, torch.bfloat16, target) == experts * one <= max(most, one)


def test_the_scratch_buffer_is_bounded_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the workers of a server; nonsense is refused before the first request."""
    assert scratch_bytes_wanted() == 2**28
    monkeypatch.setenv("BITSMOE_SCRATCH_MIB", "64")
    assert scratch_bytes_wanted() == 2**26
    monkeypatch.setenv("BITSMOE_SCRATCH_MIB", "-1")
    with pytest.raises(ConfigError, match="BITSMOE_SCRATCH_MIB='-1' is no number of MiB"):
        scratch_bytes_wanted()


def test_memory_is_bounded() -> None:
    """Of 100,000 tokens too: calls are cut into parts, whatever the design."""
    spec, packed = random_layer(SHAPE, (0, 2))
    for scratch in (0, 2**16):
        layer = TritonLayer.prepare(spec, packed, "silu", replace(H100, scratch_bytes=scratch))
        few, many, most = (layer.working_bytes(n, 2, torch.bfloat16) for n in (1000, 100_000, 10**7))
        assert few < many <= most <= 2**29 + scratch


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_experts_are_expanded_in_chunks(experts: int) -> None:
    """Chunks that begin above the first row, the last of which may lack experts; two bases, biases."""
    shape = replace(SHAPE, intermediate_size=72)
    spec, packed = random_layer(shape, (0, 2, 8), input_bases=2, has_bias=True)
    target = replace(EXPANDED, scratch_bytes=experts * 2 * 48 * 96 * 4)
    check(spec, packed, random_inputs(shape, 30, 3), target)


def test_dense_tiles_may_be_small() -> None:
    """Guards the loops over steps and tiles that large blocks skip, and their edges."""
    shape = LayerShape(num_experts=3, hidden_size=80, intermediate_size=100)
    spec, packed = random_layer(shape, (0, 1, 3))
    blocks = replace(EXPANDED.blocks, dense=DenseTile(32, 32, 1, 1), expand=Tile(16, 2, 1))
    check(spec, packed, random_inputs(shape, 150), replace(EXPANDED, blocks=blocks))


@designs
def test_experts_without_pairs_or_rows(target: Target) -> None:
    """Experts that nobody chose leave the scratch buffer unwritten, ids of no expert their outputs."""
    row_bits = random_widths(SHAPE, (0, 2, 4))
    row_bits[:, 1], row_bits[2, 2] = 0, 0
    spec, packed = random_layer(SHAPE, row_bits=row_bits)
    inputs = random_inputs(SHAPE, 20, 3)
    ids = torch.where(inputs.ids == 3, -1, inputs.ids)
    ids[0], ids[1, 0] = -1, 5
    check(spec, packed, replace(inputs, ids=ids), target)


@designs
@pytest.mark.parametrize("form", ["silu,alpha=1.702,limit=7,offset=1", "relu2,has_gate=0"])
def test_forms_of_experts(form: str, target: Target) -> None:
    """GPT-OSS clamps and has biases; Nemotron-H has no gate."""
    shape = replace(SHAPE, has_gate="has_gate=0" not in form)
    spec, packed = random_layer(shape, (0, 3), has_bias=True)
    inputs = random_inputs(shape, 20)
    value = TritonLayer.prepare(spec, packed, form, target).forward(*inputs.tensors())
    wanted = ReferenceLayer.prepare(spec, packed, gating(form)).forward(*inputs.tensors())
    assert relative_error(value, wanted) < FLOAT32


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("tokens", [1, 20])
@designs
def test_gatings_without_a_form(target: Target, tokens: int, has_gate: bool) -> None:
    """Torch computes them between the kernels, which wait for nothing all the same. In padding this one is
    not 0, which must not show."""

    def gating(*products: Tensor) -> Tensor:
        return torch.cos(products[0]) * products[-1].exp()

    shape = replace(SHAPE, has_gate=has_gate)
    spec, packed = random_layer(shape, (0, 3), has_bias=True)
    inputs = random_inputs(shape, tokens)
    ids = inputs.ids.clone()
    ids[0, 1] = -1
    inputs = replace(inputs, ids=ids)
    runtime = dispatch._on_gpu(spec, packed, gating)[0]
    assert isinstance(runtime, TritonLayer)
    value = replace(runtime, target=target).forward(*inputs.tensors())
    wanted = ReferenceLayer.prepare(spec, packed, gating).forward(*inputs.tensors())
    assert relative_error(value, wanted) < FLOAT32


def shifted(packed: PackedExperts, octaves: int) -> PackedExperts:
    """All rows larger by powers of two."""
    grid = packed.scale_grid.view(torch.float16).clone()
    grid[:, 0] += octaves
    return replace(packed, scale_grid=grid.view(torch.int16))


@designs
@pytest.mark.parametrize("octaves", [-9, 0, 4])
def test_float16_does_not_leave_its_range(octaves: int, target: Target) -> None:
    """Operands are rounded to float16 here as on a GPU, where rows of 16 bits in steps of 1.9e-4, or small
    scales, would make them subnormal, and large ones infinite. Rows of 16 and 2 bits; float16 is what numpy
    sums in, too, 2**-11 for each of 48 steps."""
    spec, packed = random_layer(SHAPE, (0, 2, 16))
    packed = shifted(packed, octaves)
    inputs = random_inputs(SHAPE, 20)
    # Hidden units are as large as a model's, whatever the scales.
    narrow = replace(inputs, hidden=(inputs.hidden * 2.0**-octaves).half())
    target = replace(target, float32_operands=False)
    value = TritonLayer.prepare(spec, packed, "silu", target).forward(*narrow.tensors())
    wanted = reference(spec, packed, replace(narrow, hidden=narrow.hidden.float()))
    assert 1e-5 < relative_error(value, wanted) < 5e-3


def check_everything(tokens: int, grid: str, target: Target, slots: int) -> None:
    """All widths, both designs; experts are chosen unevenly."""
    spec, packed = random_layer(SHAPE, ALL_WIDTHS, grid)
    inputs = random_inputs(SHAPE, tokens, slots)
    uneven = torch.where(
        torch.rand(inputs.ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5, 2, inputs.ids
    )
    check(spec, packed, replace(inputs, ids=_distinct(uneven)), target)


def _distinct(ids: Tensor) -> Tensor:
    """A token's second choice of the same expert is none."""
    again = torch.stack([(ids[:, :i] == ids[:, i : i + 1]).any(1) for i in range(ids.shape[1])], 1)
    return torch.where(again, -1, ids)


@designs
@pytest.mark.parametrize("tokens", [5, 300])
def test_both_designs_agree_with_the_reference(tokens: int, target: Target) -> None:
    """Every width in every expert; 300 tokens fill several tiles."""
    check_everything(tokens, "trellis", target, 2)


@pytest.mark.exhaustive
@designs
@pytest.mark.parametrize("grid", ["trellis", "uniform"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 17, 63, 64, 65, 127, 128, 129, 200, 256, 300])
def test_any_number_of_tokens(tokens: int, grid: str, target: Target) -> None:
    """More of the same, at both sides of all borders."""
    check_everything(tokens, grid, target, 3)
