"""On a CPU a token's output is the same bit by bit whatever other tokens are computed with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.commands.bench.synthetic import random_layer
from bitsmoe_plugin.models.gating import Gating, gating
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime import cpu_layer, dispatch

TOKENS = 90
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(params=["avx512", "avx2", "portable"], autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    if native.select(request.param) is None:
        pytest.skip(f"this machine has no {request.param}")
    threads = torch.get_num_threads()
    yield
    native.select(None)
    torch.set_num_threads(threads)


def batches() -> Iterator[Tensor]:
    """Tokens alone, all, prefixes of many lengths, random compositions, and one token many times."""
    yield from torch.arange(TOKENS)[::9, None]
    for length in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, TOKENS):
        yield torch.arange(length)
    for _ in range(6):
        yield torch.randperm(TOKENS)[: int(torch.randint(2, TOKENS, ()))]
    yield torch.full((50,), 7)


def check(runtime: dispatch.Runtime, experts: int, hidden: int, dtype: torch.dtype) -> None:
    """All compositions, with changing numbers of threads."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, hidden).to(dtype)
    # Some experts are chosen by many tokens, one by almost none, and some slots go elsewhere.
    ids = torch.multinomial(torch.linspace(0.01, 1, experts).expand(TOKENS, -1), 3)
    ids[::9, 1] = -1
    weights = torch.rand(TOKENS, 3)
    wanted = runtime.forward(x, ids, weights)
    assert bool(torch.isfinite(wanted).all())
    for number, batch in enumerate(batches()):
        torch.set_num_threads(1 + number % 3)
        out = runtime.forward(x[batch], ids[batch], weights[batch])
        assert torch.equal(out, wanted[batch]), f"{len(batch)} tokens, from {batch[:5].tolist()} on"


def layer(shape: LayerShape, **options) -> tuple[PackedSpec, PackedExperts]:
    return random_layer(shape, **{"widths": ALL_WIDTHS, "shares": [1] * len(ALL_WIDTHS), **options})


def plain(gate: Tensor, up: Tensor) -> Tensor:
    """No ``GatingForm``, with other instructions for the last elements of a tensor than for the others."""
    return torch.sigmoid(gate) * torch.tanh(up)


@DTYPES
@pytest.mark.parametrize("how", [gating("silu"), gating("gelu"), plain], ids=["silu", "gelu", "other"])
def test_any_composition(how: Gating, dtype: torch.dtype) -> None:
    """Guards against sums whose order follows the number of tokens, of experts in use or of threads."""
    spec, packed = layer(LayerShape(7, 96, 200))
    check(cpu_layer.CpuLayer.prepare(spec, packed, how), 7, 96, dtype)


@pytest.mark.parametrize("basis_bits", [8, 16])
def test_other_bases_and_grids(basis_bits: int) -> None:
    spec, packed = layer(LayerShape(4, 160, 65), basis_bits=basis_bits, grid="uniform", input_bases=2)
    check(cpu_layer.CpuLayer.prepare(spec, packed, gating("silu")), 4, 160, torch.bfloat16)


def test_parts_of_the_tokens(monkeypatch) -> None:
    """Where a batch is cut makes no difference."""
    monkeypatch.setattr(cpu_layer, "SCRATCH", 50_000)
    spec, packed = layer(LayerShape(7, 96, 200))
    check(cpu_layer.CpuLayer.prepare(spec, packed, gating("silu")), 7, 96, torch.bfloat16)


@DTYPES
def test_biases_and_kept_experts(dtype: torch.dtype) -> None:
    """These are computed by torch, whose products sum in an order that follows the number of tokens."""
    shape = LayerShape(7, 96, 200)
    spec, packed = layer(shape)
    kept = (3, 6)
    spec = replace(spec, has_bias=True, kept=kept)
    originals = {
        name.removeprefix("bitsmoe_"): (0.1 * torch.randn(size)).bfloat16().view(stored)
        for name, (stored, size) in spec.tensors().items()
        if "bias" in name or "kept" in name
    }
    check(dispatch.prepare(spec, replace(packed, **originals), gating("silu")), 7, 96, dtype)


PEAK = """
import resource, sys, torch
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.bench.synthetic import random_layer
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.runtime import cpu_layer

tokens, k = 512, 8
spec, packed = random_layer(LayerShape(8, 64, 8192), widths=(2,), shares=[1])
runtime = cpu_layer.CpuLayer.prepare(spec, packed, gating("silu"))
x, weights = torch.randn(tokens, 64).bfloat16(), torch.ones(tokens, k)
def peak(rows):
    runtime.forward(x[:rows], torch.full((rows, k), 5), weights[:rows])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak(1)
print(peak(tokens) - before, tokens * runtime.bytes_per_token(k, 1))
"""


def test_memory_of_intermediate_results_is_bounded(request) -> None:
    """All tokens on one expert with many neurons, once more than half a gigabyte."""
    if native.select(None) not in request.node.name:
        pytest.skip("the same in all instruction sets")
    done = subprocess.run([sys.executable, "-c", PEAK], stdout=subprocess.PIPE, text=True, check=True)
    grown, unbounded = (int(number) for number in done.stdout.split())
    assert grown < 1.25 * cpu_layer.SCRATCH
    assert unbounded > 1.4 * cpu_layer.SCRATCH
