"""The whole job on a small random model of every family that the README names."""

from __future__ import annotations

import pytest
import torch
from families_support import build, calibration, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bitsmoe_plugin.integrations.dequantize_checkpoint import dequantize_checkpoint
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

# 8 counted bits, of which biases take a part; a norm that enlarges the experts' errors.
COARSE = ("gpt_oss", "flex_olmo")
FAMILIES = [
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "mixtral",
    "granitemoe",
    "granitemoehybrid",
    "phimoe",
    "glm4_moe",
    "minimax_m2",
    "ernie4_5_moe",
    "gpt_oss",
    "llama4_text",
    "flex_olmo",  # norms what the experts put out
]


def is_expert(name: str) -> bool:
    """Names of routed experts' weights on disk, fused or not, in all families."""
    return ".experts." in name or ("block_sparse_moe" in name and "put_linear" in name)


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_and_reload(family: str, tiny_model, tmp_path) -> None:
    """Guards each family's checkpoint names: converters that rename or swallow packed tensors on the
    way out or in, dense layers and shared experts that get lost, a layer that is not replaced."""
    model = build(tiny_model, family)
    model.save_pretrained(tmp_path / "dense")
    expected = len(find_moe_layers(model))
    tokens = calibration()
    packed = quantize(tmp_path / "dense")
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(isinstance(m, BitsMoEExperts) for m in loaded.modules()) == expected
    with torch.no_grad():
        wanted, first, second = (m(tokens[:2]).logits for m in (model, packed, loaded))
    assert torch.equal(first, second)
    # 8 counted bits (fewer for the rows: the bases of so small a model weigh) are near the original.
    assert float((first - wanted).norm() / wanted.norm()) < (0.05 if family in COARSE else 0.02)
    assert loaded.generate(tokens[:1, :4], min_new_tokens=3, max_new_tokens=3).shape == (1, 7)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("dense", "packed"))
    others = {name: tensor for name, tensor in before.items() if not is_expert(name)}
    assert others.keys() == {name for name in after if ".bitsmoe_" not in name}
    assert all(torch.equal(tensor, after[name]) for name, tensor in others.items())
    # Back: the dense model that the packed one stands for, in memory and from files, in the original format.
    dense = loaded.dequantize()
    with torch.no_grad():
        third = dense(tokens[:2]).logits
    # The kernels round inputs to 16 bits where that loses least; flex_olmo's norm enlarges it.
    assert float((third - first).norm() / first.norm()) < 2e-5
    assert type(dense) is type(model)
    assert packed.num_parameters() == dense.num_parameters() == model.num_parameters()
    dense.save_pretrained(tmp_path / "again")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "written")
    again, written = (load_file(tmp_path / d / "model.safetensors") for d in ("again", "written"))
    assert before.keys() == again.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in again.items())


class NewcomerConfig(Qwen3MoeConfig):
    """Of a model type that transformers does not have."""

    model_type = "newcomer"


class NewcomerExperts(Qwen3MoeExperts):
    """Follows the convention, with a gating of its own."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.tanh(gate) * (up + 1)


class NewcomerModel(Qwen3MoeForCausalLM):
    config_class = NewcomerConfig

    def __init__(self, config: NewcomerConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.experts = NewcomerExperts(config)
        self.post_init()


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_an_architecture_that_we_do_not_know_works(tiny_model, tmp_path, monkeypatch) -> None:
    """Guards against needing an entry for a model that follows the convention; its gating must be used."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "newcomer", NewcomerConfig)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, NewcomerConfig, NewcomerModel)
    config = NewcomerConfig(**{**tiny_model("qwen3_moe").config.to_dict(), "model_type": "newcomer"})
    model = NewcomerModel(config).eval()
    model.save_pretrained(tmp_path / "dense")
    packed = quantize(tmp_path / "dense")
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        wanted, first, second = (m(calibration()[:2]).logits for m in (model, packed, loaded))
    assert type(loaded) is NewcomerModel
    assert torch.equal(first, second)
    assert float((first - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoe"])
def test_fused_and_per_expert_checkpoints_give_the_same(family: str, tiny_model, tmp_path) -> None:
    """Guards against a checkpoint format that is read with experts or gate and up in another order."""
    model = build(tiny_model, family)
    model.save_pretrained(tmp_path / "original")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = [load_file(tmp_path / d / "model.safetensors").keys() for d in ("original", "fused")]
    assert names[0] != names[1]
    first, second = (quantize(tmp_path / d) for d in ("original", "fused"))
    with torch.no_grad():
        assert torch.equal(first(calibration()[:2]).logits, second(calibration()[:2]).logits)


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("deepseek_v3", "model.layers.61.mlp.experts.0.gate_proj.weight"),
        ("glm4_moe", "model.layers.92.eh_proj.weight"),
        ("qwen3_next", "mtp.layers.0.mlp.experts.1.up_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.experts.1.up_proj.weight"),
        ("mixtral", "model.layers.2.mtp.weight"),
    ],
)
def test_prediction_layers_survive(family: str, name: str, tiny_model, tmp_path) -> None:
    """transformers drops layers for multi-token prediction on loading: guards against a packed checkpoint,
    and a copy saved from one, that has lost them. (Mixtral: a layer beyond the model's, not declared.)"""
    build(tiny_model, family).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    extra = torch.randn(3, 5)
    save_file({**load_file(file), name: extra}, file, {"format": "pt"})
    quantize(tmp_path / "dense").save_pretrained(tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "again")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "written")
    for directory in ("packed", "again", "written"):
        assert torch.equal(load_file(tmp_path / directory / "model.safetensors")[name], extra)
