"""BITSMOE_BATCH_INVARIANT: granted where it holds, refused by name where it does not."""

from __future__ import annotations

import pytest
import torch
from dense_twin import E, H, packed_and_twin
from transformers import AutoModelForCausalLM

from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.bench.synthetic import random_layer
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.runtime import batch_invariance, dispatch
from bitsmoe_plugin.runtime.batch_invariance import BATCH_INVARIANT


@pytest.fixture(autouse=True)
def _wanted(monkeypatch) -> None:
    monkeypatch.setenv(BATCH_INVARIANT, "1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_of_a_model_keep_it(dtype: torch.dtype) -> None:
    """The module that transformers calls: a token alone, in prefixes and in another order."""
    module, _ = packed_and_twin("qwen3_moe")
    x, weights = torch.randn(30, H).to(dtype), torch.rand(30, 2)
    ids = torch.rand(30, E).argsort(1)[:, :2]
    with torch.no_grad():
        wanted = module(x, ids, weights)
        for batch in (
            *torch.arange(30)[:, None],
            *(torch.arange(n) for n in range(2, 30)),
            torch.randperm(30),
        ):
            assert torch.equal(module(x[batch], ids[batch], weights[batch]), wanted[batch])


def test_experts_without_a_compiled_library_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "library", lambda: None)
    spec, packed = random_layer(LayerShape(2, 64, 40), widths=(2,), shares=[1])
    with pytest.raises(ConfigError, match=rf"^{BATCH_INVARIANT}: .*plain torch.*unset it") as error:
        dispatch.prepare(spec, packed, gating("silu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{BATCH_INVARIANT}: on {device.split(':')[0]} .*unset it"):
        batch_invariance.refuse_device(device)


@pytest.mark.parametrize("device_map", [{"": "cuda"}, {"model": "cpu", "lm_head": 0}], ids=str)
def test_a_model_is_refused_before_its_weights_are_read(packed_moe_tiny, device_map, monkeypatch) -> None:
    """Where its device is known by then; otherwise at the first token."""
    monkeypatch.setattr("transformers.modeling_utils.check_and_set_device_map", lambda _: device_map)
    with pytest.raises(ConfigError, match=rf"^{BATCH_INVARIANT}: on cuda "):
        AutoModelForCausalLM.from_pretrained(packed_moe_tiny, device_map=device_map)


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(BATCH_INVARIANT, "yes")
    with pytest.raises(ConfigError, match=rf"^{BATCH_INVARIANT}='yes' is neither 0 nor 1"):
        batch_invariance.is_wanted()
