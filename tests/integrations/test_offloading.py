"""Packed models of which parts are on a CPU, on disk or nowhere, as accelerate places them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
IDS = torch.arange(5, 60)[None]
MIXED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3.self_attn": "cpu",
    "model.layers.3.mlp": "disk",
    "model.layers.3.input_layernorm": "cpu",
    "model.layers.3.post_attention_layernorm": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
PLACES: list[dict[str, Any]] = [
    {"device_map": {"": "disk"}},
    {"device_map": {"": "disk"}, "offload_buffers": True},
    {"device_map": MIXED},
    {"device_map": "auto", "max_memory": {"cpu": 2_300_000}},
]


@pytest.fixture(scope="module")
def wanted(packed_moe_tiny: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(packed_moe_tiny))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def offloaded_experts(model: Any) -> int:
    """Layers of which nothing is in memory."""
    experts = [module for module in model.modules() if isinstance(module, BitsMoEExperts)]
    return sum(all(tensor.is_meta for tensor in module.parameters()) for module in experts)


@pytest.mark.parametrize("places", PLACES)
def test_offloaded_models_compute_and_save_the_same(
    packed_moe_tiny: Path, wanted: torch.Tensor, places: dict[str, Any], tmp_path: Path
) -> None:
    """Guards against experts that stay in memory, and against a state derived from tensors that are gone."""
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny, offload_folder=tmp_path / "off", **places)
    assert offloaded_experts(model) == (2 if places["device_map"] is MIXED else 4) or "max_memory" in places
    assert offloaded_experts(model) > 0
    for _ in range(2):
        assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    first, second = (load_file(d / "model.safetensors") for d in (packed_moe_tiny, tmp_path / "saved"))
    # After a forward pass transformers no longer knows that embeddings on disk are tied.
    assert second.keys() - first.keys() <= {"lm_head.weight"}
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), wanted)


def test_offloaded_layers_are_verified(packed_moe_tiny: Path, tmp_path: Path) -> None:
    """What is on disk is read once before it is used."""
    for path in packed_moe_tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(packed_moe_tiny / "model.safetensors")
    tensors["model.layers.2.mlp.experts.bitsmoe_payload"][7] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts: packed tensors do not match"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "disk"})


def test_a_model_on_the_meta_device(packed_moe_tiny: Path, moe_tiny: Any, tmp_path: Path) -> None:
    """It is there to be looked at: sizes, names, shapes of outputs."""
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny, device_map="meta")
    assert all(tensor.is_meta for tensor in model.parameters())
    assert model.num_parameters() == moe_tiny.num_parameters()
    assert model(IDS.to("meta")).logits.shape == (1, 55, 4096)
    with pytest.raises(CheckpointError, match="has no values"):
        model.save_pretrained(tmp_path / "saved")


def test_models_dispatched_later(packed_moe_tiny: Path, wanted: torch.Tensor, tmp_path: Path) -> None:
    """accelerate's own functions, on a model that was loaded whole."""
    from accelerate import cpu_offload, disk_offload, dispatch_model

    for number, place in enumerate(
        (
            lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
            lambda model: disk_offload(model, tmp_path / "disk", execution_device=torch.device("cpu")),
            lambda model: dispatch_model(model, MIXED, offload_dir=tmp_path / "mixed"),
        )
    ):
        model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny)
        place(model)
        assert offloaded_experts(model) == (4, 4, 2)[number]
        assert torch.equal(logits(model), wanted)


def test_offloaded_models_are_not_made_dense(packed_moe_tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny, device_map={"": "disk"})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts is offloaded"):
        model.dequantize()


@pytest.mark.parametrize(
    "places", [*PLACES[:3], {"device_map": "meta"}, {"device_map": "auto", "max_memory": {"cpu": 900_000}}]
)
def test_quantizing_refuses_before_weights_are_loaded(
    moe_tiny_path: Path, places: dict[str, Any], tmp_path: Path
) -> None:
    config = BitsMoEConfig(dataset=[[1, 2, 3] * 200])
    with pytest.raises(ConfigError, match="a model is not quantized while device_map"):
        AutoModelForCausalLM.from_pretrained(
            moe_tiny_path, quantization_config=config, offload_folder=tmp_path / "off", **places
        )
    assert not (tmp_path / "off").exists()


def test_counts_are_those_of_the_original(packed_moe_tiny: Path, moe_tiny: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny)
    assert model.num_parameters() == moe_tiny.num_parameters()
    assert model.model.num_parameters() == moe_tiny.model.num_parameters()
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.num_parameters() == moe_tiny.num_parameters()
        assert not any(p.requires_grad for p in same.requires_grad_(False).parameters())
        assert any(p.requires_grad for p in same.requires_grad_(True).parameters())
        assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    embeddings = moe_tiny.get_input_embeddings().weight.numel()
    assert model.num_parameters(exclude_embeddings=True) == moe_tiny.num_parameters() - embeddings
    packed = sum(p.numel() for p in model.parameters() if not p.is_floating_point())
    others = sum(p.numel() for p in model.parameters()) - packed
    assert model.num_parameters(only_trainable=True) == others
    assert model.get_memory_footprint() < (packed_moe_tiny / "model.safetensors").stat().st_size * 2
