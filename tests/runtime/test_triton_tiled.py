"""Rows and bases of converted checkpoints, with scales per 128 values, in the Triton kernels.

In Triton's interpreter against the float32 reference, as ``test_triton_layer``, whose limits of errors hold
here too: products of codes and scales are rounded to float16 alike on both sides.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bitsmoe_plugin.codec import sharding
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.packed_values import check_packed, check_sizes
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.presets import ALL_WIDTHS

pytest.importorskip("triton", reason="Triton is published for Linux only")

from triton_support import Inputs, random_inputs, random_layer, random_widths, reference, relative_error

from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer
from bitsmoe_plugin.runtime.triton.layer import TritonLayer
from bitsmoe_plugin.runtime.triton.target import INTERPRETER, BlockSizes, Target, Tile

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="compiled kernels do not take tensors on the CPU"
)
FLOAT32 = 1e-5
SHAPE = LayerShape(num_experts=3, hidden_size=48, intermediate_size=200)
"""Seven blocks, the last of which is not full, in two tiles."""
DECODE, PREFILL = 2, 20
phases = pytest.mark.parametrize("tokens", [DECODE, PREFILL], ids=["decode", "prefill"])
EXPANDED = replace(INTERPRETER, blocks=replace(INTERPRETER.blocks, decode_tokens=0, pairs_per_expert=0))


@pytest.fixture(autouse=True)
def _buffers_start_as_nan() -> Iterator[None]:
    """What a kernel fails to write shows: torch fills ``empty`` tensors."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(spec: PackedSpec, packed: PackedExperts, inputs: Inputs, target: Target | None = None) -> None:
    check_sizes("layer", spec, packed)
    check_packed("layer", spec, packed)
    value = TritonLayer.prepare(spec, packed, "silu", target).forward(*inputs.tensors())
    wanted = reference(spec, packed, inputs)
    assert bool((wanted != 0).any())
    assert relative_error(value, wanted) < FLOAT32


@pytest.mark.parametrize("tokens", [1, PREFILL])
@pytest.mark.parametrize("width", [width for width in ALL_WIDTHS if width])
def test_each_width_agrees_with_the_reference(width: int, tokens: int) -> None:
    """Codes of 1 bit are signs, those of 16 are float16."""
    shape = replace(SHAPE, hidden_size=32, intermediate_size=160)
    spec, packed = random_layer(shape, (0, width), "tiled", basis_bits=16)
    check(spec, packed, random_inputs(shape, tokens, k=1))


@pytest.mark.parametrize(
    ("design", "bases"), [("decode", 2), ("grouped", 1), ("expanded", 2), ("float32", 1)]
)
def test_mixed_widths_and_bases_of_8_bits(design: str, bases: int) -> None:
    """All kernels. Every expert's factors have other numbers of rows of each width, so that scales are looked
    for behind those of others; float32 as on a GPU has a kernel of its own for bases."""
    shape = replace(SHAPE, num_experts=2, hidden_size=128)
    spec, packed = random_layer(shape, (0, 1, 3, 8), "tiled", basis_bits=8, input_bases=bases)
    target = EXPANDED if design == "expanded" else INTERPRETER
    if design == "float32":
        target = replace(INTERPRETER, blocks=replace(INTERPRETER.blocks, expanded_tokens=100))
    check(spec, packed, random_inputs(shape, DECODE if design == "decode" else 5), target)


@phases
def test_block_sizes_for_gpus_agree_with_the_reference(tokens: int) -> None:
    """Several programs and steps in each direction, whose scales are not those of the first."""
    shape = LayerShape(num_experts=2, hidden_size=64, intermediate_size=200)
    spec, packed = random_layer(shape, (0, 2, 6), "tiled", basis_bits=16)
    small = {size: Tile(16, 2, 1) for size in (16, 32, 64, 128)}
    sizes = BlockSizes(decode_warps=(1, 1), matvec=(16, 32), basis_out=(16, 32), gate_up=small, down=small)
    check(spec, packed, random_inputs(shape, tokens, k=1), Target(sizes, 3, float32_operands=True))


@phases
def test_experts_may_have_no_rows_and_ids_none(tokens: int) -> None:
    """Gains of a factor of no rows bound nothing."""
    row_bits = random_widths(SHAPE, (0, 2, 4))
    row_bits[0], row_bits[:, 1] = 0, 0
    spec, packed = random_layer(SHAPE, (0, 2, 4), "tiled", basis_bits=16, row_bits=row_bits)
    inputs = random_inputs(SHAPE, tokens)
    ids = inputs.ids.clone()
    ids[:2] = torch.tensor([[-1, 2], [0, 3]])
    value = TritonLayer.prepare(spec, packed, "silu").forward(inputs.hidden, ids, inputs.weights)
    assert torch.equal(value, torch.zeros_like(value))  # without gate
    row_bits[0, [0, 2]] = 2
    spec, packed = random_layer(SHAPE, (0, 2, 4), "tiled", basis_bits=16, row_bits=row_bits)
    check(spec, packed, replace(inputs, ids=ids))


@pytest.mark.parametrize("target", [INTERPRETER, EXPANDED], ids=["grouped", "expanded"])
@pytest.mark.parametrize("octaves", [-6, 6])
def test_float16_does_not_leave_its_range(octaves: int, target: Target) -> None:
    """Gains of 2**-6 to 2**6, operands of float16, in which numpy sums, too: 2**-11 for each of 200 steps."""
    spec, packed = random_layer(SHAPE, (0, 2, 8), "tiled", basis_bits=16)
    gains = (packed.row_gains.view(torch.float16) * 2.0**octaves).view(torch.int16)
    packed, inputs = replace(packed, row_gains=gains), random_inputs(SHAPE, PREFILL)
    narrow = replace(inputs, hidden=(inputs.hidden * 2.0 ** -max(octaves, -1)).half())
    layer = TritonLayer.prepare(spec, packed, "silu", replace(target, float32_operands=False))
    wanted = reference(spec, packed, replace(narrow, hidden=narrow.hidden.float()))
    assert 1e-5 < relative_error(layer.forward(*narrow.tensors()), wanted) < 1e-2


@phases
def test_shards_add_up_to_the_layer(tokens: int) -> None:
    """Tensor parallel: two halves of every row, in whole tiles."""
    shape = replace(SHAPE, intermediate_size=256)
    spec, packed = random_layer(shape, (0, 2, 3), "tiled", basis_bits=16)
    inputs = random_inputs(shape, tokens)
    total = torch.zeros_like(inputs.hidden)
    for blocks in ((0, 4), (4, 8)):
        shard = sharding.Shard((0, 1, 2), blocks)
        part = sharding.slice_packed(packed, spec.widths, shape, shard)
        own = replace(spec, shape=sharding.shard_shape(shape, shard), payload_words=part.payload.numel())
        total += TritonLayer.prepare(own, part, "silu").forward(*inputs.tensors())
    assert relative_error(total, reference(spec, packed, inputs)) < FLOAT32


@phases
def test_forms_of_experts(tokens: int) -> None:
    """Without a gate, with biases."""
    shape, form = replace(SHAPE, has_gate=False), "relu2,has_gate=0"
    spec, packed = random_layer(shape, (0, 3), "tiled", basis_bits=16, has_bias=True)
    inputs = random_inputs(shape, tokens)
    value = TritonLayer.prepare(spec, packed, form).forward(*inputs.tensors())
    wanted = ReferenceLayer.prepare(spec, packed, gating(form)).forward(*inputs.tensors())
    assert relative_error(value, wanted) < FLOAT32


def test_no_grid_runs_in_plain_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards users of converted checkpoints against a warning and a crawl."""
    spec, packed = random_layer(SHAPE, (0, 2), "tiled", basis_bits=16)
    there = SimpleNamespace(payload=SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    layer = TritonLayer.prepare(spec, packed, "silu")
    monkeypatch.setattr(TritonLayer, "prepare", lambda *_: layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime = dispatch._fastest(spec, there, gating("silu"))  # type: ignore[arg-type]
    assert runtime is layer
