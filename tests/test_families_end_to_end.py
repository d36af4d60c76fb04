"""The whole job on a small random model of every family that the README names."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.experts import BitsMoEExperts
from bitsmoe_plugin.families import find_moe_layers

FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"]


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_and_reload(family: str, tiny_model, tmp_path) -> None:
    """Guards each family's checkpoint names: converters that rename or swallow packed tensors on the
    way out or in, dense layers and shared experts that get lost, a layer that is not replaced."""
    model = tiny_model(family, layer_types=["full_attention"] * 2)
    model.save_pretrained(tmp_path / "dense")
    expected = len(find_moe_layers(model))
    tokens = torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    config = BitsMoEConfig(bits=8, dataset=tokens.tolist(), sequence_length=32, basis_group_size=16)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(isinstance(m, BitsMoEExperts) for m in loaded.modules()) == expected
    with torch.no_grad():
        wanted, first, second = (m(tokens[:2]).logits for m in (model, packed, loaded))
    assert torch.equal(first, second)
    # 8 counted bits (fewer for the rows: the bases of so small a model weigh) are near the original.
    assert float((first - wanted).norm() / wanted.norm()) < 0.02
    assert loaded.generate(tokens[:1, :4], min_new_tokens=3, max_new_tokens=3).shape == (1, 7)
