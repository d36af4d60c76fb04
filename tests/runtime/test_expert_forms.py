"""Experts without a gate, with biases and with clamped gatings, in the kernels against the float32 reference.

Errors are relative, ||y - reference|| / ||reference||, with the bounds of ``test_cpu_layer`` and
``test_triton_layer``, which say where they come from.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from triton_support import random_inputs, random_layer, random_widths, relative_error

from bitsmoe_plugin.base.native import select
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.codec.sharding import Shard, shard_shape, slice_packed
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.cpu_layer import CpuLayer
from bitsmoe_plugin.runtime.gradients import gradients
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

SHAPE = LayerShape(num_experts=3, hidden_size=48, intermediate_size=40)
UNGATED = replace(SHAPE, has_gate=False)
# Text of the form; of random rows, gate and up reach some 3 here, so a limit of 1 clamps many.
FORMS = [
    "silu",
    "silu,alpha=1.702,limit=1,offset=1",
    "silu,limit=1",
    "gelu_tanh,limit=1,clamps_activation=1",
    "silu,gate_cap=1,up_cap=2",
    "relu2,has_gate=0",
    "silu,has_gate=0",
    "gelu,has_gate=0",
    "relu,has_gate=0",
]
forms = pytest.mark.parametrize("form", FORMS)
TOKENS = (1, 20)


def shape_of(form: str) -> LayerShape:
    return UNGATED if "has_gate=0" in form else SHAPE


def layer_of(form: str, **options: object):  # type: ignore[no-untyped-def]
    shape = shape_of(form)
    return random_layer(shape, has_bias=True, input_bases=shape.inputs, basis_bits=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", ["avx512", "avx2", "portable"])
@forms
def test_the_cpu_kernels_agree_with_the_reference(form: str, kernels: str) -> None:
    """Guards the number of factors in C: a stride of two where there is one reads the next token's."""
    if select(kernels) is None:
        pytest.skip(f"this machine has no {kernels}")
    try:
        spec, packed = layer_of(form)
        for tokens in TOKENS:
            inputs = random_inputs(spec.shape, tokens)
            wanted = ReferenceLayer.prepare(spec, packed, gating(form)).forward(*inputs.tensors())
            found = CpuLayer.prepare(spec, packed, gating(form)).forward(*inputs.tensors())
            assert relative_error(found, wanted) < 2e-6
    finally:
        select(None)


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="compiled kernels do not take CPU tensors")
@pytest.mark.parametrize("tokens", TOKENS)
@forms
def test_the_triton_kernels_agree_with_the_reference(form: str, tokens: int) -> None:
    """Guards biases, clamps and the number of factors, in the kernels for few tokens and for many."""
    triton_layer = pytest.importorskip("bitsmoe_plugin.runtime.triton.layer")
    spec, packed = layer_of(form)
    inputs = random_inputs(spec.shape, tokens)
    wanted = ReferenceLayer.prepare(spec, packed, gating(form)).forward(*inputs.tensors())
    found = triton_layer.TritonLayer.prepare(spec, packed, form).forward(*inputs.tensors())
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="compiled kernels do not take CPU tensors")
def test_activations_of_triton_far_out_and_at_the_limit() -> None:
    """Overflow of exp, the kink of a clamp and NaN: experts without rows put out their gating of biases."""
    triton_layer = pytest.importorskip("bitsmoe_plugin.runtime.triton.layer")
    values = torch.tensor([0.0, 1.0, -1.0, 7.0, -7.0, 7.01, 88.0, -88.0, -104.0, 1e4, -1e4])
    for form in FORMS:
        shape = replace(shape_of(form), intermediate_size=len(values) ** 2)
        bits = random_widths(shape, (0, 4, 8))
        bits[:-1] = 0  # gate and up
        spec, packed = random_layer(shape, (0, 4, 8), row_bits=bits, has_bias=True)
        grid = torch.stack(torch.meshgrid(values, values, indexing="ij")).flatten(1)[: shape.inputs]
        bias = grid.expand(shape.num_experts, -1, -1).contiguous()
        packed = replace(packed, input_bias=bias.bfloat16().view(torch.int16))
        inputs = random_inputs(shape, 3)
        wanted = ReferenceLayer.prepare(spec, packed, gating(form)).forward(*inputs.tensors())
        found = triton_layer.TritonLayer.prepare(spec, packed, form).forward(*inputs.tensors())
        assert relative_error(found, wanted) < 1e-5


@forms
def test_gradients_are_those_of_autograd(form: str) -> None:
    """The backward pass decodes rows by itself: guards its number of factors, and slopes at clamps."""
    spec, packed = layer_of(form)
    layer, inputs = ReferenceLayer.prepare(spec, packed, gating(form)), random_inputs(spec.shape, 5)
    hidden, weights = inputs.hidden.requires_grad_(), inputs.weights.requires_grad_()
    with torch.enable_grad():
        out = layer.compute(hidden, inputs.ids, weights, *layer.bases())
        # Biases of down are added outside of the rows' computation, but count in the weights' gradient.
        bias = spec.original(packed.output_bias)[inputs.ids].float()
        out = out + (weights[..., None] * bias).sum(1)
        grad = torch.randn_like(out)
        wanted = torch.autograd.grad(out, (hidden, weights), grad)
    found = gradients(layer, grad, hidden.detach(), inputs.ids, weights.detach())
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("form", ["relu2,has_gate=0", "silu,alpha=1.702,limit=1,offset=1"])
def test_shards_add_up(form: str) -> None:
    """Tensor and expert parallel: guards payload, row codes and biases, cut without unpacking."""
    shape = replace(shape_of(form), intermediate_size=96)
    spec, packed = random_layer(shape, has_bias=True)
    inputs = random_inputs(shape, 7)
    wanted = dispatch.prepare(spec, packed, gating(form)).forward(*inputs.tensors())
    for shards in (
        [Shard((0, 1, 2), (0, 1)), Shard((0, 1, 2), (1, 3))],
        [Shard((2, 0), (0, 3)), Shard((1,), (0, 3))],
    ):
        total = torch.zeros_like(wanted)
        for shard in shards:
            part = slice_packed(packed, spec.widths, shape, shard)
            own = replace(spec, shape=shard_shape(shape, shard), payload_words=part.payload.numel())
            place = {expert: i for i, expert in enumerate(shard.experts)}
            ids = inputs.ids.clone().apply_(lambda e, place=place: place.get(e, -1))
            total += dispatch.prepare(own, part, gating(form)).forward(inputs.hidden, ids, inputs.weights)
        assert relative_error(total, wanted) < 1e-5
