"""A small model of each family, and how it is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM

from bitsmoe_plugin import BitsMoEConfig

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
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1], "num_experts_per_tok": 1},
}


def build(tiny_model: Any, family: str, **changes: Any) -> Any:
    changes = {"layer_types": ["full_attention"] * 2, **CHANGES.get(family, {}), **changes}
    model = tiny_model(family, **changes)
    for name, parameter in model.named_parameters():
        if "experts" in name and name.endswith("_bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    return model


def calibration() -> Tensor:
    return torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1))


def quantize(directory: Path, **options: Any) -> Any:
    config = BitsMoEConfig(
        **{"bits": 8, "dataset": calibration().tolist(), "sequence_length": 32, **options},
        basis_group_size=16,
    )
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


def off_convention() -> JetMoeForCausalLM:
    """A model whose experts follow no convention that this package knows."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "kv_channels": 16, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return JetMoeForCausalLM(JetMoeConfig(vocab_size=4096, num_hidden_layers=1, **sizes, **experts))
