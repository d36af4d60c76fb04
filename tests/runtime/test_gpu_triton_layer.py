"""The Triton kernels, compiled, on a GPU, against the float32 reference in plain torch.

``test_triton_layer`` has more cases of the same kernels in Triton's interpreter, on any machine. Here is
what only a device shows: compiled code, tensor cores, programs that run at once, CUDA graphs, real sizes.
Triton either interprets or compiles, so the two files cannot run in one process; ``make test-gpu``, or

    TRITON_INTERPRET=0 python -m pytest tests/runtime/test_gpu_triton_layer.py

Errors are relative, ||y - reference|| / ||reference||. With float32 each of four products one after the other
sums up to 2048 terms in another order than the reference: 2048 * 2**-24 = 1.2e-4 at worst for each, and the
square root of that number, 2.7e-6, when signs are random. In bfloat16 or float16, operands and result are
rounded to nearest, by at most u = 2**-8 or 2**-11 of a value: n roundings cost at most n u where products
neither amplify nor cancel, and about 0.4 u sqrt(n) when signs are random.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.row_codec import GRIDS
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.commands.bench import synthetic
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

pytest.importorskip("triton", reason="Triton is published for Linux only")

from triton_support import Inputs, random_inputs, random_layer, random_widths, reference, relative_error

from bitsmoe_plugin.runtime.triton.layer import TritonLayer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] != "0",
    reason="needs a GPU, and TRITON_INTERPRET=0",
)
FLOAT32 = 2e-5
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = {
    "moe-tiny": (LayerShape(48, 128, 64), 4),
    "qwen3-30b-a3b": (LayerShape(128, 2048, 768), 8),
    "deepseek-v2-lite": (LayerShape(64, 2048, 1408), 6),
}
"""name -> sizes and experts per token."""
TINY = SHAPES["moe-tiny"][0]
phases = pytest.mark.parametrize("tokens", [3, 70], ids=["decode", "prefill"])
Case = tuple[PackedSpec, PackedExperts, TritonLayer]


def on_gpu(spec: PackedSpec, packed: PackedExperts) -> Case:
    moved = PackedExperts(**{name.removeprefix("bitsmoe_"): t.cuda() for name, t in packed.tensors()})
    return spec, moved, TritonLayer.prepare(spec, moved, "silu")


@cache
def known(name: str) -> Case:
    """Rows of all widths, 2 bits on average, default bases."""
    shares = synthetic.shares_at(2.0, ALL_WIDTHS)
    return on_gpu(*synthetic.random_layer(SHAPES[name][0], widths=ALL_WIDTHS, shares=shares))


def inputs_for(spec: PackedSpec, tokens: int, k: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    given = random_inputs(spec.shape, tokens, k, seed)
    return Inputs(given.hidden.to("cuda", dtype), given.ids.cuda(), given.weights.cuda())


@contextmanager
def buffers_start_as_nan() -> Iterator[None]:
    """What a kernel fails to write, and what a program reads too early, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.zeros(1, device="cuda").new_empty(2).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def roundings(layer: TritonLayer, tokens: int, slots: int, dtype: torch.dtype) -> int:
    """To the dtype of the hidden states, one after the other, between a layer's input and its output."""
    if tokens <= layer.target.blocks.decode_tokens:
        return 1  # the result
    rows = 3 * (16 in layer.state.widths)  # of gate, up and down; those of up to 8 bits are exact
    if layer.target.expands(tokens * slots, layer.state.experts, dtype):
        rows = 3
    return 6 + rows  # both bases, coordinates, hidden units, outputs in rank space, result


def check(case: Case, inputs: Inputs) -> None:
    spec, packed, layer = case
    with buffers_start_as_nan():
        value = layer.forward(*inputs.tensors())
    wanted = reference(spec, packed, replace(inputs, hidden=inputs.hidden.float()))
    dtype, tokens = inputs.hidden.dtype, len(inputs.hidden)
    assert value.dtype == dtype
    assert value.shape == wanted.shape
    assert bool((wanted != 0).any())
    n = roundings(layer, tokens, inputs.ids.shape[1], dtype)
    assert relative_error(value, wanted) < (FLOAT32 if dtype == torch.float32 else n * UNIT[dtype])


def test_the_reference_does_not_depend_on_the_device() -> None:
    """Guards what the other tests compare with."""
    spec, packed = random_layer(TINY)
    inputs = random_inputs(TINY, 70, 4)
    there = reference(*on_gpu(spec, packed)[:2], Inputs(*(t.cuda() for t in inputs.tensors())))
    assert relative_error(there.cpu(), reference(spec, packed, inputs)) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4, 16, 64, 300])
@pytest.mark.parametrize("name", SHAPES)
def test_real_sizes_agree_with_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Every kernel, at both sides of the borders between them."""
    check(known(name), inputs_for(known(name)[0], tokens, SHAPES[name][1], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 70])
@pytest.mark.parametrize(
    ("grid", "bits", "bases"), [("trellis", 4, 2), ("uniform", 8, 1), ("trellis", 16, 2), ("tiled", 16, 1)]
)
def test_bases_and_grids(grid: str, bits: int, bases: int, tokens: int, dtype: torch.dtype) -> None:
    """Every kind of basis, a tail of 8 columns, groups of 16."""
    shape = LayerShape(5, 160, 40)
    case = on_gpu(*random_layer(shape, grid=grid, basis_bits=bits, input_bases=bases))
    check(case, inputs_for(case[0], tokens, 2, dtype))


@phases
@pytest.mark.parametrize(
    ("grid", "width"),
    [(grid, w) for grid in GRIDS for w in ALL_WIDTHS if w and (w <= 4 or grid == "uniform")],
)
def test_each_width_agrees_with_the_reference(grid: str, width: int, tokens: int) -> None:
    """Guards against an error in one width that the others drown."""
    case = on_gpu(*random_layer(LayerShape(4, 64, 64), (0, width), grid))
    check(case, inputs_for(case[0], tokens, 1, torch.float32))


def routings(ids: Tensor, experts: int) -> dict[str, Tensor]:
    nobody = ids.clone()
    nobody[0], nobody[1, 0], nobody[2, 1] = -1, -1, experts
    places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    return {"one expert": torch.full_like(ids, 2), "uneven": (places % 7) ** 2 % experts, "nobody": nobody}


@phases
@pytest.mark.parametrize("routing", ["one expert", "uneven", "nobody"])
@pytest.mark.parametrize("name", ["moe-tiny", "qwen3-30b-a3b"])
def test_any_routing(name: str, routing: str, tokens: int) -> None:
    """All pairs at one expert, most at few, and ids of no expert, int32 as vLLM gives them."""
    inputs = inputs_for(known(name)[0], tokens, 4, torch.bfloat16)
    ids = routings(inputs.ids, SHAPES[name][0].num_experts)[routing]
    check(known(name), replace(inputs, ids=ids.int()))


@phases
def test_no_expert_at_all(tokens: int) -> None:
    """Guards against stale buffers: nothing writes but the last sum."""
    inputs = inputs_for(known("moe-tiny")[0], tokens, 4, torch.bfloat16)
    with buffers_start_as_nan():
        value = known("moe-tiny")[2].forward(inputs.hidden, torch.full_like(inputs.ids, -1), inputs.weights)
    assert torch.equal(value, torch.zeros_like(value))


@phases
@pytest.mark.parametrize("factors", [(0,), (1, 2), (0, 1, 2)], ids=["gate", "up-down", "all"])
def test_experts_may_have_no_rows(factors: tuple[int, ...], tokens: int) -> None:
    """What no row writes must still be zero."""
    row_bits = random_widths(TINY, ALL_WIDTHS)
    row_bits[list(factors), :24] = 0
    case = on_gpu(*random_layer(TINY, row_bits=row_bits))
    check(case, inputs_for(case[0], tokens, 4, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("name", ["moe-tiny", "qwen3-30b-a3b"])
def test_calls_are_equal_bit_by_bit(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Guards against races and sums without a fixed order."""
    inputs = inputs_for(known(name)[0], tokens, 4, dtype)
    first = known(name)[2].forward(*inputs.tensors())
    assert all(torch.equal(known(name)[2].forward(*inputs.tensors()), first) for _ in range(10))


@pytest.mark.parametrize("scratch", [0, 2**26, 2**28])
def test_very_many_tokens(scratch: int) -> None:
    """More than 256 pairs per expert: experts are expanded, 128 in chunks of 10 or 32; or rows are decoded
    for several tiles, in two parts, because more memory than allowed would be used at once."""
    spec, packed, layer = known("qwen3-30b-a3b")
    layer = replace(layer, target=replace(layer.target, scratch_bytes=scratch))
    inputs = inputs_for(spec, 3500 if scratch == 0 else 4100, 8, torch.bfloat16)
    check((spec, packed, layer), inputs)


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 4100])
@pytest.mark.parametrize("name", ["moe-tiny", "qwen3-30b-a3b"])
def test_a_graph_computes_what_it_is_given(name: str, tokens: int) -> None:
    """A CUDA graph is captured with one input and replayed with other states and other routing."""
    spec, _, layer = known(name)
    static = inputs_for(spec, tokens, 4, torch.bfloat16)
    layer.forward(*static.tensors())  # compiles, and may not while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.forward(*static.tensors())
    for seed in range(1, 4):
        inputs = inputs_for(spec, tokens, 4, torch.bfloat16, seed)
        inputs.ids[-1, : seed - 1] = -1
        for target, value in zip(static.tensors(), inputs.tensors(), strict=True):
            target.copy_(value)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, layer.forward(*inputs.tensors()))


def test_a_packed_model_on_the_gpu(packed_moe_tiny: Path) -> None:
    """From the checkpoint to text: the CPU's logits and greedy tokens, through the kernels of this file."""
    from transformers import AutoModelForCausalLM

    cpu, gpu = (
        AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype=torch.float32, device_map=device)
        for device in ("cpu", "cuda")
    )
    prompt = torch.arange(1, 65).view(2, 32)
    with torch.no_grad():
        wanted, value = cpu(prompt).logits, gpu(prompt.cuda()).logits.cpu()
    experts = [module for module in gpu.modules() if isinstance(module, BitsMoEExperts)]
    assert experts
    assert all(isinstance(module.runtime(), TritonLayer) for module in experts)
    # Both keep float32 inputs; sums come in another order, by which the router may flip a tie.
    assert relative_error(value, wanted) < 5e-3
    options = {"max_new_tokens": 16, "do_sample": False}
    texts = [model.generate(prompt.to(model.device), **options).cpu() for model in (cpu, gpu)]
    assert torch.equal(*texts)
