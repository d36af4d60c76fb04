"""What can refuse a save does so before the first layer is calibrated; prediction layers keep their names."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bitsmoe_plugin import BitsMoEConfig, CheckpointError, QuantizationError
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline import quantize

TOKENS = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))
OPTIONS = {"bits": 8, "method": "paper-v2", "basis_bits": 4, "basis_group_size": 16, "sequence_length": 16}
NEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
PREDICTION = {
    "mtp.norm.weight": (32,),
    "mtp.layers.0.mlp.experts.gate_up_proj": (4, 32, 32),  # which saving would split
    "mtp.layers.0.mlp.experts.0.gate_proj.weight": (16, 32),  # as this
}


def _config(**changes: Any) -> BitsMoEConfig:
    return BitsMoEConfig(dataset=TOKENS.tolist(), **{**OPTIONS, **changes})


@pytest.fixture(scope="module")
def dense(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with prediction layers that its class has no module for."""
    path = tmp_path_factory.mktemp("dense") / "model"
    tiny_model("qwen3_next", **NEXT).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    tensors |= {name: torch.randn(shape) for name, shape in PREDICTION.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def _stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def _check_prediction(path: Path, dense: Path) -> None:
    found, wanted = _stored(path), load_file(dense / "model.safetensors")
    assert {name for name in found if "mtp" in name} == set(PREDICTION)
    assert all(torch.equal(found[name], wanted[name]) for name in PREDICTION)


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_prediction_layers_keep_their_names(dense: Path, tmp_path: Path) -> None:
    """Guards against layers that a draft model needs and no longer finds: saving renames and splits."""
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=_config())
    shutil.rmtree(source)  # a download that is cleaned up must not cost the hours of quantization
    model.save_pretrained(tmp_path / "packed")
    _check_prediction(tmp_path / "packed", dense)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(packed(TOKENS).logits, model(TOKENS).logits)
    packed.save_pretrained(tmp_path / "own names", save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own names")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    _check_prediction(tmp_path / "again", dense)
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_tensors_that_a_class_declares_unused_are_kept(tiny_model, tmp_path: Path) -> None:
    """Guards against a packed A.X-K1 that vLLM cannot load: it makes the norms behind dense layers that
    published files have. Old buffers stay out."""
    dense = tiny_model("axk1", mlp_layer_types=["dense", "sparse"])
    dense.save_pretrained(tmp_path / "x")
    spare = {"model.layers.0.post_mlp_layernorm.weight": torch.randn(32)}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(4)}
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert not {*spare, *buffer} & stored.keys()
    save_file({**stored, **spare, **buffer}, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x", quantization_config=_config())
    model.save_pretrained(tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "again")
    for name in ("packed", "again"):
        found = _stored(tmp_path / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in spare.items())
        assert not buffer.keys() & found.keys()


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_a_source_that_was_written_over_is_refused(dense: Path, tmp_path: Path) -> None:
    """Guards against prediction layers of another model, or a crash inside the mapped file."""
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=_config())
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"written over.*mtp\.\S+ is to be saved"):
        model.save_pretrained(tmp_path / "packed")
    assert not list((tmp_path / "packed").iterdir())


def _no_layer(*arguments: Any) -> None:
    raise AssertionError("a layer was calibrated")


@pytest.mark.parametrize("resumed", [False, True])
def test_what_transformers_will_not_save_is_refused_before_the_first_layer(
    resumed: bool, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a refusal after hours, and again on each attempt to go on."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("GenerationConfig is\ninvalid")

    if resumed:
        (tmp_path / "out.work").mkdir()
    monkeypatch.setattr(quantize, "plan_layers", _no_layer)
    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    message = "cannot save this model, so it is not quantized: GenerationConfig is invalid"
    with pytest.raises(QuantizationError, match=message):
        quantize_to_directory(str(dense), tmp_path / "out", _config())
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_not_save_is_refused_before_the_first_layer(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers saves no model whose config holds what belongs to generation."""
    monkeypatch.setattr(quantize, "plan_layers", _no_layer)
    config = AutoConfig.from_pretrained(dense)
    config.num_beams = 4
    with pytest.raises(QuantizationError, match=r"cannot save this model.*num_beams"):
        AutoModelForCausalLM.from_pretrained(dense, config=config, quantization_config=_config())


def _renamed(dense: Path, source: Path, old: str, new: str) -> Path:
    """The model with names that its class knows by a key_mapping only."""
    shutil.copytree(dense, source)
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("named", ["decoder.", "model.blocks."])
def test_packed_tensors_that_would_not_be_found_again_are_refused(
    named: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving reverts key_mapping, so the packed model would need it on loading too."""
    monkeypatch.setattr(quantize, "plan_layers", _no_layer)
    own = {"decoder.": "model.", "model.blocks.": "model.layers."}[named]
    source = _renamed(dense, tmp_path / "source", own, named)
    mapping = {"^" + re.escape(named): own}
    warnings.simplefilter("error")  # as would one say that all of decoder is left out
    with pytest.raises(QuantizationError, match=rf"would be saved as {named}\S+, where it would not"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=_config(), key_mapping=mapping)
