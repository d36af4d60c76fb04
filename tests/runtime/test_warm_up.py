"""Kernels are compiled before the first request, and launched where their tensors are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux only")

from triton_support import random_layer

from bitsmoe_plugin.base.triton_launch import Launch, run
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.triton import warm_up
from bitsmoe_plugin.runtime.triton.layer import TritonLayer
from bitsmoe_plugin.runtime.triton.target import Target, block_sizes
from bitsmoe_plugin.runtime.with_originals import WithOriginals

SHAPE = LayerShape(num_experts=8, hidden_size=256, intermediate_size=96)
MOST = 3000


@pytest.fixture
def layer() -> TritonLayer:
    """With the block sizes of an H100."""
    spec, packed = random_layer(SHAPE, input_bases=2)
    return TritonLayer.prepare(spec, packed, "silu", Target(block_sizes(9), 132))


@pytest.mark.parametrize(("slots", "dtype"), [(1, torch.float32), (8, torch.bfloat16)])
def test_no_call_launches_what_was_not_compiled(layer: TritonLayer, slots: int, dtype: torch.dtype) -> None:
    """Guards against a request of 17 or 33 tokens that waits for Triton's compiler."""
    chosen = warm_up.numbers_of_tokens(layer, slots, dtype, MOST)
    ready = {kind for tokens in chosen for kind in warm_up.compiled(layer, slots, dtype, tokens)}
    assert chosen[0] == 1
    assert len(chosen) < 20
    for tokens in (*range(1, 260), 511, 512, 1000, 1024, 2047, 2048, MOST):
        missing = set(warm_up.compiled(layer, slots, dtype, tokens)) - ready
        assert not missing, (tokens, [kind[0] for kind in missing])


def test_kinds_are_told_apart(layer: TritonLayer) -> None:
    """What Triton compiles for once: decode, tiles of 16 and 32 pairs, a multiple of 16 in all or not,
    larger tiles, experts that are expanded, dtypes."""
    kinds = [
        set(warm_up.compiled(layer, 2, dtype, tokens))
        for dtype in (torch.bfloat16, torch.float32)
        for tokens in (1, 15, 16, 33, 40, 65, 1030)
    ]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])
    assert set(warm_up.compiled(layer, 2, torch.bfloat16, 33)) == set(
        warm_up.compiled(layer, 2, torch.bfloat16, 61)
    )


@pytest.mark.parametrize("kept", [False, True])
def test_a_layer_is_warmed_up_once(layer: TritonLayer, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By calls of the numbers chosen, also through what adds biases; layers of one size share kernels."""
    calls = []

    def forward(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor, *_: Any) -> Tensor:
        if hidden.device.type != "meta":
            assert (hidden.dtype, ids.dtype, weights.dtype) == (torch.bfloat16, torch.int32, torch.float32)
            assert ids.shape == weights.shape == (len(hidden), 2)
            calls.append(len(hidden))
            return torch.zeros_like(hidden)
        return original(self, hidden, ids, weights, *_)

    original = TritonLayer.forward
    chosen = warm_up.numbers_of_tokens(layer, 2, torch.bfloat16, 100)
    monkeypatch.setattr(TritonLayer, "forward", forward)
    monkeypatch.setattr(warm_up, "_COMPILED", set())
    spec, _ = random_layer(SHAPE, input_bases=2)
    runtime = WithOriginals(layer, spec, gating("silu")) if kept else layer
    dispatch.warm_up(runtime, 2, torch.bfloat16, 100)
    assert calls == chosen
    dispatch.warm_up(replace(layer), 2, torch.bfloat16, 100)
    assert calls == chosen
    dispatch.warm_up(runtime, 2, torch.bfloat16, 90)
    assert len(calls) > len(chosen)


def test_nothing_is_compiled_for_a_cpu() -> None:
    """There a layer is computed by code that is compiled with the package."""
    spec, packed = random_layer(SHAPE)
    before = set(warm_up._COMPILED)
    dispatch.warm_up(dispatch.prepare(spec, packed, gating("silu")), 2, torch.float32, 100)
    assert before == warm_up._COMPILED


def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU; a model of transformers may lie on several, and then its kernels
    would be given addresses of another."""
    here: list[Tensor] = []
    launched = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        here.append(tensor)
        yield
        here.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **given: launched.append((grid, here[-1] is given["x"], given))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch = Launch(Kernel(), (3, 2), {"size": 5, "x": torch.zeros(2)}, {"BLOCK": 4}, num_warps=2)
    run(launch)
    ((grid, on_its_gpu, given),) = launched
    assert (grid, on_its_gpu, given["BLOCK"], given["num_warps"]) == ((3, 2), True, 4, 2)
    assert not here


@pytest.mark.parametrize(
    ("capability", "old"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((12, 0), False)]
)
def test_kernels_are_for_gpus_with_registers_enough(
    capability: tuple[int, int], old: bool, layer: TritonLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses older ones; in transformers layers run in plain torch there, and a warning says why."""
    spec, _ = random_layer(SHAPE)
    there = SimpleNamespace(payload=SimpleNamespace(device=torch.device("cuda", 1)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(TritonLayer, "prepare", lambda *_: layer)
    runtime, reason = dispatch._on_gpu(spec, there, gating("silu"))  # type: ignore[arg-type]
    assert (runtime is None) == old
    assert ("compute capability 8.0" in reason) == old


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="compiled kernels take no CPU tensors")
def test_warmed_up_calls_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls run through the kernels themselves, and what is computed afterwards is what it was."""
    shape = LayerShape(num_experts=3, hidden_size=48, intermediate_size=40)
    spec, packed = random_layer(shape, (0, 2))
    small = TritonLayer.prepare(spec, packed, "silu")
    x, ids = torch.randn(3, 48), torch.tensor([[0, 1]] * 3)
    before = small.forward(x, ids, torch.full((3, 2), 0.5))
    monkeypatch.setattr(warm_up, "_COMPILED", set())
    dispatch.warm_up(small, 2, torch.float32, 20)
    assert torch.equal(small.forward(x, ids, torch.full((3, 2), 0.5)), before)
