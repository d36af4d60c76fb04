"""Options that are changed, copied or given as a dict after all: checked when used, at every door."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTQConfig

from bitsmoe_plugin import BitsMoEConfig, BitsMoEQuantizer, ConfigError
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.integrations.optimum import BitsMoEQuantizer as OptimumQuantizer
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline import quantize_model
from bitsmoe_plugin.presets import METHODS

TOKENS = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {
    "bits": 8,
    "dataset": TOKENS.tolist(),
    "sequence_length": 64,
    "calibration_tokens": 512,
    "method": "paper-v2",
    "basis_group_size": 16,
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("changes") / "model"
    tiny_model("qwen3_moe").save_pretrained(path)
    return path


def load(model: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config)


DOORS: dict[str, Callable[[Path, Path, Any], Any]] = {
    "from_pretrained": lambda model, out, config: load(model, config),
    "quantizer": lambda model, out, config: BitsMoEQuantizer(config, pre_quantized=False),
    "quantize_model": lambda model, out, config: quantize_model(
        AutoModelForCausalLM.from_pretrained(model), TOKENS, config
    ),
    "quantize_to_directory": lambda model, out, config: quantize_to_directory(str(model), out, config),
    "estimate": lambda model, out, config: estimate(model, config),
    "optimum": lambda model, out, config: OptimumQuantizer(str(model)).quantize(
        out, quantization_config=config
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bits", 99, "bits=99 is not allowed"),
        ("layers", 3, "layers='int' is not allowed"),
        ("layer_bits", None, "layer_bits=None is not allowed"),
        ("bist", 3, "unknown option bist"),
        ("method", "fast", r"update\(method='fast'\)"),
    ],
)
def test_a_value_set_later_is_refused_before_work_begins(
    door: str, name: str, value: Any, message: str, model: Path, tmp_path: Path
) -> None:
    """It was checked at construction alone: the budget of 99 bits was spent, a misspelt option ignored."""
    config = BitsMoEConfig(**OPTIONS)
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        DOORS[door](model, tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"bits": 99}, {"bits": 3, "bist": 3}, {"method": "best"}])
def test_update_checks_and_changes_all_or_nothing(options: dict[str, Any]) -> None:
    """transformers' own gives unknown names back, which nobody looks at."""
    config = BitsMoEConfig(**OPTIONS)
    before = config.to_dict()
    with pytest.raises(ConfigError, match=r"99|bist|best"):
        config.update(**options)
    assert config.to_dict() == before


def test_update_of_the_method_brings_its_options() -> None:
    """Or the card would say "fast" of a model that was quantized by the default."""
    config = BitsMoEConfig(bits=3, basis_bits=8, dataset=["text"])
    assert config.update(method="fast", bits=2.5, widths=[0, 2]) == {}
    expected = BitsMoEConfig(method="fast", bits=2.5, widths=(0, 2), basis_bits=8)
    assert config.to_dict() == expected.to_dict()
    assert config.dataset == ["text"]
    config.validate()


def test_a_list_of_widths_set_later_is_as_good_as_one_given() -> None:
    config = BitsMoEConfig()
    config.widths = [0, 2, 4]  # type: ignore[assignment]
    config.validate()
    assert config.widths == (0, 2, 4)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, BitsMoEConfig.checked_copy])
def test_copies_share_the_text_and_nothing_that_can_be_changed(make: Callable) -> None:
    """A model's config must not follow what the user does to the one that was given, nor copy gigabytes."""
    budgets, experts, text = {"a": 2.0}, {"a": [1]}, ["text"]
    config = BitsMoEConfig(layer_bits=budgets, super_experts=experts, dataset=text)
    budgets["b"], experts["a"] = 3.0, [2]
    other = make(config)
    assert other.to_dict() == config.to_dict()
    assert other.dataset is text
    other.layer_bits["c"], other.super_experts["a"][0], other.layers["x"] = 4.0, 5, {}
    assert (config.layer_bits, config.super_experts, config.layers) == ({"a": 2.0}, {"a": [1]}, {})


def test_a_dict_is_as_good_as_a_config(model: Path, tmp_path: Path) -> None:
    """As quantizers of transformers and optimum take it; the dict stays as it was."""
    given = {"quant_method": "bitsmoe", **OPTIONS, "layer_bits": {}}
    packed = load(model, given)
    assert isinstance(packed.config.quantization_config, BitsMoEConfig)
    packed.save_pretrained(tmp_path / "dict")
    load(model, BitsMoEConfig(**OPTIONS)).save_pretrained(tmp_path / "config")
    OptimumQuantizer(str(model)).quantize(tmp_path / "optimum", quantization_config=given)
    assert given == {"quant_method": "bitsmoe", **OPTIONS, "layer_bits": {}}
    for name in ("model.safetensors", "config.json"):
        contents = {(tmp_path / way / name).read_bytes() for way in ("dict", "config", "optimum")}
        assert len(contents) == 1, name


@pytest.mark.parametrize("door", ["quantize_to_directory", "estimate", "optimum", "from_pretrained"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "bitsmoe", "bits": 99}, "bits=99"),
        ({"quant_method": "bitsmoe", "bist": 2}, "unknown option bist"),
    ],
)
def test_a_dict_is_checked(door: str, given: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        DOORS[door](model, tmp_path / "out", given)


@pytest.mark.parametrize("door", ["quantize_to_directory", "estimate", "optimum"])
def test_options_of_another_quantizer_are_refused(door: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config is a GPTQConfig; give a BitsMoEConfig"):
        DOORS[door](model, tmp_path / "out", GPTQConfig(bits=4))
    with pytest.raises(ConfigError, match="quant_method='gptq' is not allowed"):
        DOORS[door](model, tmp_path / "out", {"quant_method": "gptq", "bits": 4})


def test_a_packed_model_whose_options_were_broken_is_not_saved(model: Path, tmp_path: Path) -> None:
    """It would be refused by whoever loads it."""
    packed = load(model, OPTIONS | {"quant_method": "bitsmoe"})
    packed.config.quantization_config.bits = 99
    with pytest.raises(ConfigError, match="bits=99"):
        packed.save_pretrained(tmp_path)


def test_the_grid_of_imported_checkpoints_is_not_quantized_to(model: Path) -> None:
    """The config of an imported model has it, and may be used again."""
    config = BitsMoEConfig(**OPTIONS)
    config.grid, config.layers, config.basis_group_size = "tiled", {"a": {}}, 128
    config.validate()
    with pytest.raises(ConfigError, match="grid='tiled' is not allowed"):
        DOORS["quantize_model"](model, model, config)


def test_every_method_is_found_again() -> None:
    """``made_with`` is neither stored nor an option."""
    for method in METHODS:
        config = BitsMoEConfig(method=method)
        assert "made_with" not in config.to_dict()
        assert BitsMoEConfig.from_dict(config.to_dict()).made_with == method
