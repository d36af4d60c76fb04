"""Derived tensors of the GPU kernels, updated where CUDA graphs hold them; in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from triton_support import random_inputs, random_layer, random_widths

from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.runtime.triton.layer import TritonLayer
from vllm_ext.derived_state import derived_tensors, update_derived

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="compiled kernels do not take tensors on the CPU"
)
SHAPE = LayerShape(num_experts=3, hidden_size=48, intermediate_size=64)


@pytest.mark.parametrize(("grid", "bits"), [("trellis", 4), ("tiled", 16)])
def test_a_captured_layer_computes_what_is_written_into_it(grid: str, bits: int) -> None:
    """Guards against offsets of the rows before: a replayed graph derives nothing."""
    widths = random_widths(SHAPE, (0, 1, 2, 3, 4))
    spec, packed = random_layer(SHAPE, grid=grid, basis_bits=bits, row_bits=widths)
    other_spec, other = random_layer(  # as many rows of each width
        SHAPE, grid=grid, basis_bits=bits, row_bits=widths.flip(1), seed=1
    )
    assert spec == other_spec
    captured, inputs = TritonLayer.prepare(spec, packed, "silu"), random_inputs(SHAPE, 3)
    before = captured.forward(*inputs.tensors())
    derived = derived_tensors(captured)
    assert set(derived) >= {"state_starts", "state_counts", "state_order"}
    stored = {"state_payload", "state_row_codes", "state_scale_grid", "state_tile_scales", "state_row_gains"}
    assert not (stored | {"input_basis_codes"}) & {name for name, t in derived.items() if t.numel()}
    for (_, tensor), (_, new) in zip(packed.tensors(), other.tensors(), strict=True):
        tensor.copy_(new)
    for tensor in derived.values():
        tensor.fill_(-1)  # sleep of level 2 forgets them
    update_derived("layer", captured, TritonLayer.prepare(spec, packed, "silu"))
    wanted = TritonLayer.prepare(spec, other, "silu").forward(*inputs.tensors())
    assert torch.equal(captured.forward(*inputs.tensors()), wanted)
    assert not torch.equal(wanted, before)


def test_derived_tensors_of_other_sizes_are_refused() -> None:
    layers = [TritonLayer.prepare(*random_layer(LayerShape(n, 48, 64)), "silu") for n in (2, 3)]
    with pytest.raises(ConfigError, match=r"layer: .*restart vLLM"):
        update_derived("layer", *layers)
