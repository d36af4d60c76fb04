"""Which models are accepted, where their experts are found, and which are refused by name."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from forms_support import CAUSAL
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV4Config,
    GptOssConfig,
    Inkling2TextConfig,
    NemotronHConfig,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.compare.rtn import quantize_rtn, round_to_nearest
from bitsmoe_plugin.errors import ConfigError, QuantizationError
from bitsmoe_plugin.models.declared_computation import check_computation
from bitsmoe_plugin.models.families import (
    apply_gating,
    decoder_layer_name,
    find_moe_layers,
    layer_shape,
    read_biases,
    read_experts,
    routed_inputs,
)
from bitsmoe_plugin.models.gating import GatingForm, form_of, probe
from bitsmoe_plugin.runtime.layer_kind import gating_name

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


def test_experts_that_are_not_fused_are_named() -> None:
    """They hold no layer that would be found: "not an MoE model" would send the user looking elsewhere."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe"))
    with pytest.raises(QuantizationError, match=r"'jetmoe' cannot be quantized.*JetMoeMoE"):
        find_moe_layers(model)


def test_shared_experts_are_no_routed_ones(tiny_model) -> None:
    """Inkling's are 3-D as well, and no router chooses among them."""
    model = tiny_model("inkling_text", **CAUSAL["3-D shared experts"][1])
    assert [layer.name for layer in find_moe_layers(model)] == [
        f"model.layers.{i}.mlp.experts" for i in (0, 1)
    ]


# Of transformers' families: what their own ``_apply_gate`` or activation says, by its constants.
FORMS = {
    "qwen3_moe": "silu",
    "gpt_oss": "silu,alpha=1.702,limit=7,offset=1",
    "deepseek_v4": "silu,limit=10",
    "nemotron_h": "relu2,has_gate=0",
    "inkling2": "silu,gate_cap=4,up_cap=25",
}


@pytest.mark.parametrize("family", FORMS)
def test_gatings_are_found_by_trying(family: str) -> None:
    """Guards the table that kernels know: a constant that is missed is a plausible, wrong number."""
    kinds = {
        "qwen3_moe": (Qwen3MoeExperts, Qwen3MoeConfig(num_experts=2)),
        "gpt_oss": (GptOssExperts, GptOssConfig(num_local_experts=2)),
        "deepseek_v4": (DeepseekV4Experts, DeepseekV4Config(n_routed_experts=2)),
        "nemotron_h": (NemotronHExperts, NemotronHConfig(n_routed_experts=2)),
        "inkling2": (Inkling2Experts, Inkling2TextConfig(n_routed_experts=2)),
    }
    kind, config = kinds[family]
    with torch.device("meta"):
        module = kind(config)
    assert gating_name(module) == FORMS[family]
    form, products = GatingForm.parse(FORMS[family]), probe("has_gate=0" not in FORMS[family])
    # torch computes halves of one tensor, as Inkling2's module takes them, with other instructions.
    wanted = module.act_fn(*products) if form.has_caps else apply_gating(module, *products)
    assert torch.equal(form(*products), wanted)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2"])
@pytest.mark.parametrize("gate", [True, False])
def test_activations_of_transformers_have_a_form(activation: str, gate: bool) -> None:
    act = ACT2FN[activation]
    form = form_of((lambda g, u: act(g) * u) if gate else act, gate)
    assert form is not None
    assert GatingForm.parse(form.text()) == form
    assert form_of(form, gate) == form


@pytest.mark.parametrize("caps", [(4.0, 25.0), (0.7, 3.0), (30.0, math.inf), (math.inf, 7.5)])
def test_soft_caps_are_found_by_trying(caps: tuple[float, float]) -> None:
    """Of the linear part of the gate, whose sigmoid sees all of it, of up, or of both."""
    form = GatingForm("silu", gate_cap=caps[0], up_cap=caps[1])
    assert form_of(lambda g, u: form(g, u)) == form
    assert GatingForm.parse(form.text()) == form


def test_what_no_form_computes_has_none() -> None:
    """Other caps and activations, other limits for gate and up: never the nearest form."""
    for gating in (
        lambda g, u: 4 * torch.tanh(torch.nn.functional.silu(g) / 4) * u,
        lambda g, u: torch.nn.functional.silu(4 * torch.tanh(g / 4)) * u,
        lambda g, u: torch.tanh(g) * u,
        lambda g, u: torch.nn.functional.silu(g.clamp(max=7)) * u.clamp(-5, 5),
        lambda g, u: torch.nn.functional.silu(g.clamp(-7, 7)) * u.clamp(-7, 7),
        lambda g, u: torch.nn.functional.silu(g) * u * u,
        lambda g, u: torch.nn.functional.silu(g) * 0.5 * u,
    ):
        assert form_of(gating) is None
    assert form_of(torch.nn.functional.mish, False) is None
    for text in (
        "mish",
        "silu,limit=0",
        "silu,limit=-1",
        "silu,alpha=nan",
        "silu,x=1",
        "silu,has_gate",
        "silu,gate_cap=-4",
        "gelu,up_cap=4",
        "silu,has_gate=0,up_cap=4",
        "silu,limit=7,up_cap=4",
        "gelu,,",
    ):
        with pytest.raises(ConfigError):
            GatingForm.parse(text)


def test_biases_and_interleaved_rows_reproduce_the_module(tiny_model, make_layer) -> None:
    """Guards GPT-OSS: transposed weights, gate and up in turn, biases, clamped activation. Biases are
    strong here, and inputs large enough for the clamp, so that leaving one out fails. float32: 1e-5."""
    module = find_moe_layers(tiny_model("gpt_oss"))[0].module
    for bias in (module.gate_up_proj_bias, module.down_proj_bias):
        bias.data = torch.randn_like(bias)
    weights, biases = read_experts(module), read_biases(module)
    assert layer_shape(module) == LayerShape(4, 32, 16)
    a: LayerActivations = make_layer(4, 16, 32, 20).activations
    x = 200 * a.hidden
    wanted = torch.zeros_like(x)
    for t, slot in torch.cartesian_prod(torch.arange(20), torch.arange(2)).tolist():
        e = int(a.top_k_index[t, slot])
        products = biases.add(weights.gate[e] @ x[t], weights.up[e] @ x[t], expert=e)
        assert float(products[0].max()) > module.limit or t > 0
        out = weights.down[e] @ apply_gating(module, *products) + biases.down[e]
        wanted[t] += a.top_k_weights[t, slot] * out
    with torch.no_grad():
        got = module(x, a.top_k_index, a.top_k_weights)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_copies_of_the_inputs_are_understood(tiny_model) -> None:
    """Guards Llama4: the router's weight is in the input, and each expert is called with all tokens."""
    model = tiny_model("llama4_text", moe_layers=[0, 1], num_experts_per_tok=1)
    module = find_moe_layers(model)[0].module
    hidden, expert = torch.randn(7, 32), torch.tensor([0, 1, 3, 3, 0, 1, 1])
    copies = torch.zeros(4, 7, 32)
    copies[expert, torch.arange(7)] = hidden
    x, index, share = routed_inputs(module, [copies.flatten(0, 1)])
    assert torch.equal(x, hidden)
    assert torch.equal(index[:, 0], expert)
    assert torch.equal(share, torch.ones(7, 1))
    copies[(expert + 1) % 4, torch.arange(7)] = hidden
    with pytest.raises(QuantizationError, match="num_experts_per_tok=1"):
        routed_inputs(module, [copies.flatten(0, 1)])


def test_experts_that_are_not_as_they_declare_are_refused_by_name(tiny_model) -> None:
    """What deviates in more than layout computes something else: reading it as ours gives noise."""
    for flag, value, reason in (
        ("has_gate", False, "no fused up_proj"),
        ("has_post_expert_norm", True, "no post_expert_norm"),
        ("act_fn", torch.nn.PReLU(), "an activation with parameters of its own"),
    ):
        model = tiny_model("qwen3_moe")
        setattr(model.model.layers[1].mlp.experts, flag, value)
        with pytest.raises(QuantizationError) as error:
            find_moe_layers(model)
        for part in ("model.layers.1.mlp.experts", "Qwen3MoeExperts", "'qwen3_moe'", reason):
            assert part in str(error.value)


def test_undeclared_experts_are_refused_by_name(tiny_model) -> None:
    """A module of the right shapes that does not say how it stores them could be anything."""
    model = tiny_model("qwen3_moe")
    del model.model.layers[0].mlp.experts.is_transposed
    with pytest.raises(QuantizationError, match="is_transposed is not declared"):
        find_moe_layers(model)


def test_experts_that_compute_something_else_than_declared_are_refused(tiny_model, make_layer) -> None:
    """Guards against a family that came after us, declares the convention and adds a twist to its forward."""
    module = find_moe_layers(tiny_model("qwen3_moe"))[0].module
    a = make_layer(4, 16, 32, 20).activations
    inputs = a.hidden, a.top_k_index, a.top_k_weights
    with torch.no_grad():
        check_computation("experts", module, read_experts(module), inputs)
        plain = module.forward
        module.forward = lambda x, *routing: 1.1 * plain(x, *routing)
        with pytest.raises(QuantizationError, match=r"Qwen3MoeExperts.* computes something else"):
            check_computation("experts", module, read_experts(module), inputs)


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


def test_rounding_to_nearest_groups_inputs_of_transposed_weights(tiny_model) -> None:
    """Guards the baseline of ``compare`` on GPT-OSS: groups lie along the inputs, however stored."""
    model = tiny_model("gpt_oss")
    wanted = round_to_nearest(read_experts(find_moe_layers(model)[0].module).down, 2, 16)
    quantize_rtn(model, 2, 16)
    assert torch.equal(read_experts(find_moe_layers(model)[0].module).down, wanted)
