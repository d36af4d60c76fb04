"""What is left of a model and its config when quantizing them fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.pipeline import quantize_model, round_pass
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token")

BLOCKS = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(1))


def options(**changes: Any) -> BitsMoEConfig:
    return BitsMoEConfig(**{"bits": 8, "basis_group_size": 16, "scope": "layer", **changes})


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Rounding so-many-th of the MoE layers is an error."""
    calls, fit = [0], round_pass._fit_layer

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise OSError("no space left")
        return fit(*args)

    monkeypatch.setattr(round_pass, "_fit_layer", failing)


def test_a_failure_before_experts_are_replaced_changes_nothing(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes of single modules and the config's old manifest included."""
    model, config = tiny_model("qwen3_moe").train(), options()
    model.model.norm.eval()
    config.layers = {"model.layers.7.mlp.experts": {"num_experts": 4}}
    state = copy.deepcopy(model.state_dict())
    fail_at(monkeypatch, 1)
    with pytest.raises(OSError, match="no space left"):
        quantize_model(model, BLOCKS, config)
    assert config.layers == {"model.layers.7.mlp.experts": {"num_experts": 4}}
    assert config.calibration == {}
    assert model.training
    assert not model.model.norm.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model(BLOCKS[:1])


def test_a_model_that_is_quantized_in_part_refuses_to_be_used(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guards against half of a model that answers, or that is saved."""
    model, config = tiny_model("qwen3_moe"), options()
    fail_at(monkeypatch, 2)
    with pytest.raises(OSError, match="no space left"):
        quantize_model(model, BLOCKS, config)
    assert config.layers == {}
    said = r"stopped part way \(OSError: no space left\).*load it again"
    for use in (
        lambda: model(BLOCKS[:1]),
        lambda: model.model(BLOCKS[:1]),
        lambda: model.state_dict(),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(QuantizationError, match=said):
            use()
    assert not list(tmp_path.glob("*.safetensors"))


def test_modes_are_those_of_before(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3_moe").train()
    model.model.norm.eval()
    quantize_model(model, BLOCKS, options())
    experts = [module for module in model.modules() if isinstance(module, BitsMoEExperts)]
    assert len(experts) == 2
    assert all(module.training for module in experts)
    assert model.training
    assert not model.model.norm.training


def test_float64_originals_are_stored_in_float32(tiny_model: Callable[..., Any]) -> None:
    """Biases and kept experts; the format has no code for 64 bits."""
    model = tiny_model("gpt_oss").double()
    model.set_experts_implementation("eager")  # the only one that computes in float64
    layer = "model.layers.0.mlp.experts"
    config = options(bits=16, super_experts={layer: [1]})
    reference = copy.deepcopy(model)(BLOCKS[:1]).logits
    quantize_model(model, BLOCKS, config)
    assert config.layers[layer]["original_dtype"] == "float32"
    packed = model.get_submodule(layer).packed()
    assert packed.kept_input is not None
    assert packed.kept_input.dtype == packed.output_bias.dtype == torch.int32
    logits = model(BLOCKS[:1]).logits
    assert float(((logits - reference).norm() / reference.norm()).detach()) < 0.01


def test_the_manifest_is_set_when_all_is_done(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against passes that write into the options while others read them."""
    config, seen, fit = options(), [], round_pass._fit_layer
    manifest = {"model.layers.7.mlp.experts": {"num_experts": 4}}
    config.layers = dict(manifest)

    def watched(*args: Any) -> Any:
        seen.append(config.layers == manifest and config.calibration == {})
        return fit(*args)

    monkeypatch.setattr(round_pass, "_fit_layer", watched)
    assert quantize_model(tiny_model("qwen3_moe"), BLOCKS, config) is config
    assert seen == [True, True]
    assert list(config.layers) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(entry["report"]["calibration_error"] > 0 for entry in config.layers.values())
    assert config.calibration["tokens"] > 0
