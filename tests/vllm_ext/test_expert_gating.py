"""What vLLM's layers compute between an expert's projections, against transformers' own modules."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_support import needs_vllm, write_random_packed

from bitsmoe_plugin import CheckpointError, ConfigError
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.models.gating import GatingForm

pytestmark = needs_vllm
SHAPE = LayerShape(num_experts=4, hidden_size=64, intermediate_size=64)


def _layer(activation: str, **options: float) -> Any:
    return SimpleNamespace(
        activation=SimpleNamespace(value=activation), **{f"swiglu_{key}": v for key, v in options.items()}
    )


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        (_layer("silu"), GatingForm("silu")),
        (_layer("gelu_tanh"), GatingForm("gelu_tanh")),
        (_layer("silu", limit=10.0), GatingForm("silu", limit=10.0)),
        (_layer("swigluoai"), GatingForm("silu", alpha=1.702, limit=7.0, offset=1.0)),
        (
            _layer("swigluoai_uninterleave", limit=7.0, alpha=1.5, beta=1.0),
            GatingForm("silu", alpha=1.5, limit=7.0, offset=1.0),
        ),
        (_layer("relu2_no_mul"), GatingForm("relu2", has_gate=False)),
    ],
)
def test_it_is_the_gating_that_vllm_names(layer: Any, form: GatingForm) -> None:
    """Guards clamps, offsets and slopes that would be left out."""
    from vllm_ext.expert_gating import gating_of

    assert gating_of("layer", layer, form) == form


def test_another_gating_than_that_of_transformers_is_refused() -> None:
    """vLLM has constants where config.json has entries: it would serve another model without a word."""
    from vllm_ext.expert_gating import gating_of

    with pytest.raises(ConfigError, match=r"layers\.1\.experts.*vLLM computes silu,.*offset=1.*limit=10"):
        gating_of(
            "layers.1.experts", _layer("swigluoai"), GatingForm("silu", alpha=1.702, limit=10.0, offset=1)
        )
    with pytest.raises(ConfigError, match="vLLM computes gelu, transformers silu"):
        gating_of("x", _layer("gelu"), GatingForm("silu"))
    with pytest.raises(ConfigError, match="something that has no name"):
        gating_of("x", _layer("silu"), None)


@pytest.mark.parametrize("layer", [_layer("situ"), _layer("gelu", limit=7.0)])
def test_a_gating_that_has_no_form_is_refused(layer: Any) -> None:
    from vllm_ext.expert_gating import gating_of

    with pytest.raises(ConfigError, match=r"cannot serve experts with vLLM's gating '(situ|gelu)'"):
        gating_of("x", layer, GatingForm("silu"))


def test_the_gating_of_config_json_is_compared(tmp_path: Path) -> None:
    """From the files to vLLM's layer: a config.json whose hidden_act was altered."""
    from vllm_layers import Model

    write_random_packed(tmp_path, SHAPE, 1)
    assert Model(tmp_path).quant_config.gating("model.layers.0.mlp.experts") == GatingForm("silu")
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, "hidden_act": "gelu"}))
    with pytest.raises(ConfigError, match="vLLM computes silu, transformers gelu"):
        Model(tmp_path)


def test_router_weights_on_the_inputs_of_several_experts_are_refused(tmp_path: Path) -> None:
    """Each expert would have an input of its own; with one expert the input is scaled (Llama4)."""
    from vllm_layers import Experts

    from vllm_ext.layer_checks import check_experts

    config = write_random_packed(tmp_path, SHAPE, 1)
    from bitsmoe_plugin.checkpoint.manifest import packed_spec

    spec = packed_spec("model.layers.0.mlp.experts", config)
    experts = Experts(SHAPE, None, experts_per_token=2)
    experts.apply_router_weight_on_input = True
    with pytest.raises(ConfigError, match="inputs of 2 experts per token"):
        check_experts("x", spec, experts.moe_config, experts)
    experts.moe_config.experts_per_token = 1
    check_experts("x", spec, experts.moe_config, experts)
    experts.activation.is_gated = False
    with pytest.raises(CheckpointError, match="no gate, the packed ones a gate"):
        check_experts("x", spec, experts.moe_config, experts)
