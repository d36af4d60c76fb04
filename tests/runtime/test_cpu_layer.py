"""The compiled kernels for the CPU against the reference in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.bench.synthetic import random_layer
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime import cpu_layer, dispatch
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

TOLERANCE = {1: 5e-4, 2: 3e-5}
"""By planes. With one, inputs are rounded to 2^-15.99 of the largest of 64 (or, before down, of up to 2048),
so relative to their norm they err by at most sqrt(2048 / 12) * 2^-16 = 2e-4 if one value rules, three times
in a row. With two (float32) what remains is the rounding of float32 sums; measured: 1e-6, and up to 7e-6 in
1,500 layers of which some have one column, where sums cancel."""
BOTH_PLANES = pytest.mark.parametrize("planes", [1, 2])


@pytest.fixture(params=["avx512", "avx2", "portable"], autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    if native.select(request.param) is None:
        pytest.skip(f"this machine has no {request.param}")
    yield
    native.select(None)


def routing(tokens: int, experts: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    return ids, torch.rand(tokens, k, generator=g)


def compute(runtime: cpu_layer.CpuLayer, inputs: tuple[Tensor, Tensor, Tensor], planes: int) -> Tensor:
    """Output in float32; one plane is what inputs in half precision take, before their output is rounded."""
    if planes == 2:
        return runtime.forward(*inputs)
    out = torch.empty_like(inputs[0])
    runtime._forward(*inputs, out, planes)
    return out


def both(
    shape: LayerShape, inputs: tuple[Tensor, Tensor, Tensor], planes: int = 2, **options
) -> tuple[Tensor, Tensor]:
    """Outputs of the kernels and of the reference on a random layer."""
    options = {"widths": ALL_WIDTHS, "shares": [1] * len(ALL_WIDTHS), **options}
    spec, packed = random_layer(shape, **options)
    runtime = cpu_layer.CpuLayer.prepare(spec, packed, gating("silu"))
    reference = ReferenceLayer.prepare(spec, packed, gating("silu"))
    return compute(runtime, inputs, planes), reference.forward(*inputs)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    return float((out - wanted).norm() / wanted.norm())


@given(
    experts=st.integers(1, 5),
    hidden=st.sampled_from([16, 32, 48, 80, 96, 160]),
    size=st.sampled_from([1, 31, 32, 33, 64, 65, 95, 130, 192]),
    tokens=st.sampled_from([1, 2, 3, 17]),
    bases=st.sampled_from([(4, 16), (8, 16), (16, 32)]),
    input_bases=st.sampled_from([1, 2]),
    grid=st.sampled_from(["trellis", "uniform"]),
    widths=st.sampled_from([ALL_WIDTHS, (0, 1, 2, 3, 4), (2,), (0, 3), (6, 8, 16), (4, 0, 2)]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_layer_computes_what_the_reference_does(
    experts: int,
    hidden: int,
    size: int,
    tokens: int,
    bases: tuple[int, int],
    input_bases: int,
    grid: str,
    widths: tuple[int, ...],
    seed: int,
) -> None:
    """Guards the decoders (rings, windows, fields, tables), tails of rows and columns, runs of one width
    shorter than a tile, dropped rows and empty experts, and the sums' bounds."""
    ids, weights = routing(tokens, experts, min(2, experts), seed)
    inputs = (torch.randn(tokens, hidden), ids, weights)
    out, wanted = both(
        LayerShape(experts, hidden, size),
        inputs,
        widths=widths,
        shares=[1] * len(widths),
        basis_bits=bases[0],
        basis_group_size=bases[1],
        input_bases=input_bases,
        grid=grid,
        seed=seed,
    )
    assert bool((wanted != 0).any()) or 0 in widths
    assert float((out - wanted).norm()) <= TOLERANCE[2] * float(wanted.norm())


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("basis_bits", [4, 8])
@BOTH_PLANES
def test_groups_of_the_bases(group: int, basis_bits: int, planes: int) -> None:
    """A group within a chunk of 64 columns, as long as one, and over two."""
    inputs = (torch.randn(5, 384), *routing(5, 3, 2, 0))
    options = {"basis_bits": basis_bits, "basis_group_size": group}
    assert relative_error(*both(LayerShape(3, 384, 40), inputs, planes, **options)) < TOLERANCE[planes]


@BOTH_PLANES
def test_wide_bases(planes: int) -> None:
    """More columns than are decoded at a time, and a last part of one block."""
    inputs = (torch.randn(6, 2080), *routing(6, 2, 1, 0))
    assert relative_error(*both(LayerShape(2, 2080, 32), inputs, planes)) < TOLERANCE[planes]


@pytest.mark.parametrize("size", [2048, 2080, 4200])
@BOTH_PLANES
def test_long_rows(size: int, planes: int) -> None:
    """More columns than integer sums of 32 bits hold: they are cut into panels."""
    inputs = (torch.randn(3, 64), *routing(3, 2, 1, 0))
    assert relative_error(*both(LayerShape(2, 64, size), inputs, planes)) < TOLERANCE[planes]


@BOTH_PLANES
def test_the_largest_sums_do_not_overflow(planes: int) -> None:
    """All inputs at the limit and all codes alike, which random inputs never come near to."""
    shape = LayerShape(1, 64, 2048)
    spec, packed = random_layer(shape, widths=(8,), shares=[1], input_bases=1)
    packed.payload.fill_(-1)
    h = torch.ones(1, 2048)
    inputs = (torch.ones(1, 64), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    layers = [kind.prepare(spec, packed, lambda gate, up: h) for kind in (cpu_layer.CpuLayer, ReferenceLayer)]
    out, wanted = compute(layers[0], inputs, planes), layers[1].forward(*inputs)
    assert relative_error(out, wanted) < TOLERANCE[planes]


def test_many_tokens_are_computed_in_parts(monkeypatch) -> None:
    monkeypatch.setattr(cpu_layer, "SCRATCH", 100_000)
    inputs = (torch.randn(300, 64), *routing(300, 4, 2, 0))
    assert relative_error(*both(LayerShape(4, 64, 40), inputs)) < TOLERANCE[2]


FORMS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "silu,alpha=1.702,limit=7,offset=1")


CAPS = "silu,gate_cap=4,up_cap=25"


@pytest.mark.parametrize("form", [*FORMS, "silu,limit=1.5", CAPS, "gelu,limit=0.5,clamps_activation=1"])
def test_gatings(form: str) -> None:
    """Those that the library computes by itself, near zero and where they saturate."""
    shape, how = LayerShape(3, 64, 70), gating(form)
    spec, packed = random_layer(shape, widths=(2, 4), shares=[1, 1])
    inputs = (torch.randn(8, 64) * torch.logspace(-3, 2, 8)[:, None], *routing(8, 3, 2, 0))
    out, wanted = (
        kind.prepare(spec, packed, how).forward(*inputs) for kind in (cpu_layer.CpuLayer, ReferenceLayer)
    )
    errors = (out - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(errors.max()) < TOLERANCE[2]


def test_experts_held_elsewhere_add_nothing() -> None:
    """Ids outside 0..E-1, for some or all slots of a token."""
    ids, weights = routing(6, 4, 2, 0)
    ids[0], ids[1, 0], ids[2, 1] = -1, 4, -1
    x = torch.randn(6, 64)
    out, wanted = both(LayerShape(4, 64, 40), (x, ids, weights))
    assert relative_error(out, wanted) < TOLERANCE[2]
    assert torch.equal(out[0], torch.zeros(64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_in_the_output(bad: float) -> None:
    """Integers must not turn a broken activation into a plausible number; other tokens stay as they are."""
    x, (ids, weights) = torch.randn(3, 64), routing(3, 4, 2, 0)
    shape = LayerShape(4, 64, 40)
    clean, _ = both(shape, (x, ids, weights))
    x[1, 5] = bad
    out, _ = both(shape, (x, ids, weights))
    assert not bool(torch.isfinite(out[1]).any())
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
def test_inputs_of_any_size(scale: float) -> None:
    """Each stretch of inputs has a scale of its own; zeros and the very small stay zeros. The gating is
    linear here: silu of so large values is not."""
    spec, packed = random_layer(LayerShape(2, 64, 40), widths=(2,), shares=[1])
    inputs = (scale * torch.randn(2, 64), *routing(2, 2, 1, 0))
    layers = [
        kind.prepare(spec, packed, lambda gate, up: gate + up)
        for kind in (cpu_layer.CpuLayer, ReferenceLayer)
    ]
    out, wanted = (layer.forward(*inputs) for layer in layers)
    assert float((out - wanted).norm()) <= TOLERANCE[2] * float(wanted.norm()) + 1e-28


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    inputs = (torch.randn(2, 64).to(dtype), *routing(2, 4, 2, 0))
    out, wanted = both(LayerShape(4, 64, 40), inputs)
    assert out.dtype == dtype
    assert relative_error(out.float(), wanted.float()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    inputs = (torch.randn(4, 256), *routing(4, 4, 2, 0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        wanted, _ = both(LayerShape(4, 256, 72), inputs)
        torch.set_num_threads(threads)
        out, _ = both(LayerShape(4, 256, 72), inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, wanted)


def test_a_runtime_holds_no_copy_of_the_payload() -> None:
    spec, packed = random_layer(LayerShape(4, 64, 40), widths=(2,), shares=[1])
    runtime = dispatch.prepare(spec, packed, gating("silu"))
    assert isinstance(runtime, cpu_layer.CpuLayer)
    assert runtime.layer.payload == packed.payload.data_ptr()


def test_layers_share_the_lookup_tables() -> None:
    """One of 8 to 16 KB for each width, not for each layer of a model."""
    spec, packed = random_layer(LayerShape(2, 64, 40), widths=(1, 2), shares=[1, 1])
    layers = [cpu_layer.CpuLayer.prepare(spec, packed, gating("silu")).layer for _ in range(2)]
    first, second = ([layer.decoders[i].joint for i in range(2)] for layer in layers)
    assert first == second
    assert len({None, *first}) == 3
