"""The whole job on a small random model of every family that the README names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.experts import BitsMoEExperts
from bitsmoe_plugin.families import find_moe_layers

# Both kinds of layer of the hybrids; other families ignore what they do not know.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
}
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
]


def build(tiny_model: Any, family: str) -> Any:
    return tiny_model(family, **{"layer_types": ["full_attention"] * 2, **CHANGES.get(family, {})})


def calibration() -> Tensor:
    return torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1))


def quantize(directory: Path, **options: Any) -> Any:
    config = BitsMoEConfig(
        **{"bits": 8, "dataset": calibration().tolist(), "sequence_length": 32, **options},
        basis_group_size=16,
    )
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


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
    assert float((first - wanted).norm() / wanted.norm()) < 0.02
    assert loaded.generate(tokens[:1, :4], min_new_tokens=3, max_new_tokens=3).shape == (1, 7)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("dense", "packed"))
    others = {name: tensor for name, tensor in before.items() if not is_expert(name)}
    assert others.keys() == {name for name in after if ".bitsmoe_" not in name}
    assert all(torch.equal(tensor, after[name]) for name, tensor in others.items())
