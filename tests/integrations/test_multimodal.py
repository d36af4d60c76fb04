"""Multimodal MoE models: quantized whole from the command line, or their language model alone in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.commands.evaluate import load_for_evaluation
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.models.model_class import auto_class

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:no tokenizer saved")
TOKENS = torch.randint(10, 64, (4, 16), generator=torch.Generator().manual_seed(1))
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
PREDICTION_EXPERTS = 4 * 32 * 32
PREDICTION = {"mtp.fc.weight": (32, 64), "mtp.layers.0.mlp.experts.gate_up_proj": (4, 32, 32)}


def _config() -> BitsMoEConfig:
    options = {"method": "paper-v2", "basis_bits": 4, "basis_group_size": 16, "sequence_length": 16}
    return BitsMoEConfig(bits=8, dataset=TOKENS.tolist(), **options)


def _build(family: str) -> Any:
    torch.manual_seed(0)
    if family == "qwen3_5_moe":
        config = Qwen3_5MoeConfig(text_config=TEXT, vision_config={**VISION, "patch_size": 4})
        return Qwen3_5MoeForConditionalGeneration(config)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = {**TEXT, "rope_parameters": rope, "decoder_sparse_step": 1, "mlp_only_layers": []}
    del text["layer_types"]
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config={**VISION, "deepstack_visual_indexes": [0]})
    )


@pytest.fixture(scope="module", params=["qwen3_5_moe", "qwen3_vl_moe"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model"
    _build(request.param).eval().save_pretrained(path)
    if request.param == "qwen3_5_moe":
        tensors = load_file(path / "model.safetensors")
        tensors |= {name: torch.randn(shape) for name, shape in PREDICTION.items()}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def _names(path: Path, part: str) -> set[str]:
    return {name for name in load_file(path / "model.safetensors") if part in name}


def test_it_is_quantized_whole(dense: Path, tmp_path: Path) -> None:
    """Guards against a refusal when all layers are rounded, and a traceback before the first."""
    out = tmp_path / "out"
    quantize_to_directory(str(dense), out, _config())
    for part in ("visual", "mtp."):
        assert _names(out, part) == _names(dense, part)
    report = inspect_checkpoint(out)
    assert estimate(dense, _config()).layers == len(report["layers"]) == 2
    experts = 4 * PREDICTION_EXPERTS if _names(dense, "mtp.") else 0
    assert report["prediction"]["experts"] == experts
    assert (f"{experts:,} of them their unquantized experts" in (out / "README.md").read_text()) == (
        experts > 0
    )
    packed, reference = load_for_evaluation(str(out)), load_for_evaluation(str(dense))
    assert type(packed) is type(reference)
    assert "ConditionalGeneration" in type(packed).__name__
    with torch.no_grad():
        wanted = reference(TOKENS).logits
        error = (packed(TOKENS).logits - wanted).norm() / wanted.norm()
    assert error < 0.05  # 8 bits
    assert 'AutoModelForMultimodalLM.from_pretrained("DIR")' in (out / "README.md").read_text()


@pytest.mark.parametrize("dense", ["qwen3_5_moe"], indirect=True)
def test_its_language_model_alone_says_what_is_left_out(dense: Path, tmp_path: Path) -> None:
    """A causal language model class ignores ``model.visual``, which is no prediction layer."""
    with pytest.warns(UserWarning, match=r"model\.visual \(\d+ tensors\).*AutoModelForMultimodalLM"):
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=_config())
    model.save_pretrained(tmp_path)
    assert not _names(tmp_path, "visual")
    assert _names(tmp_path, "mtp.") == set(PREDICTION)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("dense", ["qwen3_5_moe"], indirect=True)
def test_one_class_loads_what_the_other_packed(dense: Path, tmp_path: Path) -> None:
    """The two have other names for the same decoder layers."""
    whole = AutoModelForMultimodalLM.from_pretrained(dense, quantization_config=_config())
    whole.save_pretrained(tmp_path / "whole")
    language = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(language(TOKENS).logits, whole(TOKENS).logits)
    language.save_pretrained(tmp_path / "language")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    assert torch.equal(again(TOKENS).logits, whole(TOKENS).logits)


def test_no_language_model_is_refused_by_name() -> None:
    from transformers import AutoConfig

    with pytest.raises(QuantizationError, match="model type 'vit' is no language model"):
        auto_class(AutoConfig.for_model("vit"))
