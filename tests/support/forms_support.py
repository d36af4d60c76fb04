"""Small random models whose experts deviate from gated ones, by the form that they show."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NEMOTRON = {
    "layers_block_type": ["moe", "full_attention", "moe"],
    "layer_types": ["moe", "full_attention", "moe"],
    "moe_shared_expert_intermediate_size": 16,
    "moe_intermediate_size": 64,
}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "no gate": ("nemotron_h", NEMOTRON),
    "no gate, latent size": ("nemotron_h", {**NEMOTRON, "moe_latent_size": 16}),
    "identity experts": (
        "longcat_flash",
        {
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 64,
            "ffn_hidden_size": 16,
            "moe_topk": 3,
            "num_layers": 2,
            "qk_head_dim": 32,
        },
    ),
    "3-D shared experts": (
        "inkling_text",
        {
            "layer_types": ["hybrid", "hybrid"],
            "mlp_layer_types": ["sparse", "sparse"],
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "rel_extent": 16,
            "moe_intermediate_size": 64,
        },
    ),
}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention"] * 2,
    "mlp_layer_types": ["sparse"] * 2,
}
_VISION = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "norm after each expert": (
        "muse_spark",
        {
            "text_config": {**_TEXT, "num_local_experts": 4, "moe_hidden_size": 32},
            "vision_config": {**_VISION, "out_hidden_size": 32},
            "audio_config": {
                "hidden_sizes": [16, 16],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "patch_sizes": [4, 4],
                "out_hidden_size": 32,
            },
        },
    ),
    "clamp after the activation": (
        "step3p7",
        {
            "text_config": {
                **_TEXT,
                "n_routed_experts": 4,
                "sliding_window": 16,
                "share_expert_dim": 16,
                "num_sliding_attention_heads": 2,
                "swiglu_limits": [0.0, 0.3],
                "swiglu_limits_shared": [0.0, 0.0],
            },
            "vision_config": _VISION,
        },
    ),
}


def multimodal_model(form: str) -> Any:
    """Of ``MULTIMODAL``, its experts strong enough for clamps and norms to matter."""
    family, values = MULTIMODAL[form]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**values)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "experts.post_expert_norm" in name:
            parameter.data.normal_(std=0.2)
        elif ".experts." in name:
            parameter.data.mul_(8)
    return model
