"""Which models are accepted, where their experts are found, and which are refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.families import apply_gating, decoder_layer_name, find_moe_layers, read_experts
from bitsmoe_plugin.statistics import LayerActivations

# model type -> decoder layers that have routed experts (DeepSeek-V3: the first one is dense)
SUPPORTED = {
    "qwen3_moe": [0, 1],
    "qwen2_moe": [0, 1],
    "mixtral": [0, 1],
    "olmoe": [0, 1],
    "deepseek_v3": [1],
}


@pytest.mark.parametrize(("model_type", "expected"), SUPPORTED.items())
def test_experts_are_found_in_forward_order(tiny_model, model_type: str, expected: list[int]) -> None:
    """Guards the fused convention: names, order and the decoder layer around each experts module."""
    model = tiny_model(model_type)
    layers = find_moe_layers(model)
    assert [layer.layer_name for layer in layers] == [f"model.layers.{i}" for i in expected]
    for layer in layers:
        assert layer.name.startswith(layer.layer_name + ".")
        assert layer.name.endswith(".experts")
        assert model.get_submodule(layer.name) is layer.module


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_weights_and_gating_reproduce_the_module(tiny_model, make_layer, model_type: str) -> None:
    """Guards against swapped gate and up rows or another activation: our own token-by-token
    forward on what ``read_experts`` returns is what the module computes. float32: 1e-5."""
    module = find_moe_layers(tiny_model(model_type))[-1].module
    weights = read_experts(module)
    assert (weights.num_experts, weights.intermediate_size, weights.hidden_size) == (4, 16, 32)
    reference = make_layer(4, 16, 32, 20)
    layer = type(reference)(weights, reference.activations, partial(apply_gating, module))
    a: LayerActivations = reference.activations
    with torch.no_grad():
        wanted = module(a.hidden, a.top_k_index, a.top_k_weights)
        got = layer.forward(a.hidden, a.top_k_index, a.top_k_weights)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_dense_model_is_refused(tiny_model) -> None:
    """Not "nothing to do": the user asked for a method that cannot help this model."""
    with pytest.raises(QuantizationError, match=r"'llama' has no MoE layers"):
        find_moe_layers(tiny_model("llama"))


def test_gpt_oss_is_refused_by_name(tiny_model) -> None:
    """Its experts are transposed, interleaved and have biases: reading them as ours gives noise."""
    with pytest.raises(QuantizationError) as error:
        find_moe_layers(tiny_model("gpt_oss"))
    message = str(error.value)
    for part in (
        "model.layers.0.mlp.experts",
        "GptOssExperts",
        "'gpt_oss'",
        "biases",
        "transposed",
        "interleaved",
    ):
        assert part in message


def test_experts_outside_a_list_of_layers_are_refused(tiny_model) -> None:
    """Calibration walks decoder layers; an experts module anywhere else has none."""
    block = tiny_model("qwen3_moe").model.layers[0].mlp
    with pytest.raises(QuantizationError, match=r"experts is not inside a list of decoder layers"):
        find_moe_layers(torch.nn.ModuleDict({"block": block}))


def test_decoder_layer_is_the_outermost_list_entry() -> None:
    """Guards against taking a list inside a decoder layer (blocks, adapters) for the decoder."""
    inner = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"experts": torch.nn.Identity()})])}
    )
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Identity(), inner])})
    assert decoder_layer_name(model, "layers.1.blocks.0.experts") == "layers.1"
