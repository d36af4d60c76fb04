"""How much of the experts' output reaches the residual stream, in families that do not just add it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward, capture_layer
from bitsmoe_plugin.calibration.residual_gain import as_seen_by_the_stream, residual_gains
from bitsmoe_plugin.models.families import find_moe_layers


def gains_of(model: Any, batch_size: int = 2) -> tuple[Tensor | None, Tensor]:
    """Gains of the first decoder layer on 5 blocks of 16 tokens, and its experts' output ``[T, H]``."""
    vocabulary, (layer, *_) = model.config.vocab_size, find_moe_layers(model)
    blocks = torch.randint(1, vocabulary, (5, 16))
    outputs: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda _module, _args, out: outputs.append(out.float()))
    with torch.no_grad():
        forward = LayerwiseForward(model, model.model.layers, blocks, batch_size)
        results = forward.run(0)
        handle.remove()
        return residual_gains(forward, 0, layer.module, results), torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_as_it_is_has_no_gain(dtype: torch.dtype, moe_tiny) -> None:
    """Guards models that were right without it: they must not change by a bit, roundings or not."""
    assert gains_of(copy.deepcopy(moe_tiny).to(dtype))[0] is None


def test_a_multiplier_is_the_gain_of_all_tokens(tiny_model) -> None:
    """GraniteMoe: what makes up for a drift of the stream must be four times as large, not as large."""
    gains, _ = gains_of(tiny_model("granitemoe", residual_multiplier=0.25))
    torch.testing.assert_close(gains, torch.full((80,), 0.25))


def test_a_norm_has_the_gain_of_its_slope(tiny_model) -> None:
    """FlexOlmo norms the experts' output: gain 1 / its size, token by token; 0.96 of it at our step. Batches
    are of two sizes, so mixing up tokens would show."""
    model = tiny_model("flex_olmo")
    find_moe_layers(model)[0].module.down_proj.data *= 1e5  # far above the norm's epsilon
    gains, outputs = gains_of(model)
    slopes = outputs.square().mean(-1).rsqrt()
    assert gains is not None
    assert float((gains / slopes).median()) == pytest.approx(0.96, abs=0.04)
    assert float((gains / slopes).std()) < 0.1
    assert float(slopes.std() / slopes.mean()) > 0.2


def test_token_weights_are_those_of_the_stream(tiny_model) -> None:
    """An error that arrives twice as large weighs four times; with equal weights, all by the mean."""
    model = tiny_model("qwen3_moe")
    forward = LayerwiseForward(model, model.model.layers, torch.randint(64, (2, 16)), 2)
    activations, _ = capture_layer(forward, 0, find_moe_layers(model)[0].module, "residual")
    gains = torch.linspace(1, 2, 32)
    own = as_seen_by_the_stream(activations, gains, alike=False).token_weights
    torch.testing.assert_close(own, activations.token_weights * gains**2)
    alike = as_seen_by_the_stream(activations, gains, alike=True).token_weights
    torch.testing.assert_close(alike, activations.token_weights * (gains**2).mean())
    assert as_seen_by_the_stream(activations, None, alike=False) is activations
