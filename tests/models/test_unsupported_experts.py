"""Model classes whose experts cannot be quantized say why, before a weight is read."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers

ROOT = Path(__file__).parents[2]
REASONS = {
    "diffusion_gemma/DiffusionGemmaForBlockDiffusion": r"several lists of decoder layers \(model\.encoder\.",
    "ernie4_5_vl_moe/Ernie4_5_VLMoeForConditionalGeneration": r"\.text_moe\.experts and .* in one decoder",
    "jetmoe/JetMoeForCausalLM": r"its experts \(JetMoeMoE, JetMoeParallelExperts\) are not stored",
    "nllb-moe/NllbMoeForConditionalGeneration": r"its experts \(NllbMoeExperts\) are not stored",
    "qwen3_omni_moe/Qwen3OmniMoeForConditionalGeneration": r"lists of decoder layers \(thinker\..*, talker\.",
}


def _model(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Of a class of the coverage table, without weights."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "coverage"))
    entry = import_module("model_classes").ModelClass(*name.split("/"))
    config = import_module("small_models").small_config(entry)
    with torch.device("meta"):
        return getattr(transformers, entry.name)._from_config(config)


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against errors of the loader, of libraries, or after a model was calibrated."""
    with pytest.raises(QuantizationError, match=REASONS[name]):
        find_moe_layers(_model(name, monkeypatch))


def test_experts_of_an_encoder_for_images_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text does not reach them; those of the language model can be quantized all the same."""
    layers = find_moe_layers(_model("dots3_note/Dots3NoteForConditionalGeneration", monkeypatch))
    assert {layer.layer_name.rpartition(".")[0] for layer in layers} == {"model.language_model.layers"}
