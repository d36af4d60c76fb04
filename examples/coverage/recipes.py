"""Sizes of the small models: of all, and what some classes need beside."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "d_ff"), 64),
    **dict.fromkeys(("dense_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_hidden_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("num_sliding_attention_heads",), 2),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 64),
    **dict.fromkeys(("text_hidden_size", "out_hidden_size", "audio_hidden_size", "thinker_hidden_size"), 64),
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    # Sizes that vLLM's attention kernels for the CPU know.
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 128),
    "zero_expert_num": 2,
    "sliding_window": 64,
}
"""Entry of any config, nested or not -> its value where the class has such an entry."""
OPTIONAL = ("q_lora_rank", "sliding_window", "global_head_dim")
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers")
TOKENS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "sep_token_id",
    "blank_token_id",
)
_TWO_KINDS = {"layer_types": ["conv", "full_attention"]}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
_ERNIE_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 8]}
_QWEN4 = {
    "output_gate_type": "sigmoid",
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_DOTS3 = {
    "index_topk": 8,
    "swa_head_dim": 128,
    "swa_qk_nope_head_dim": 64,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 64,
    "swa_kv_lora_rank": 512,
    "swa_v_head_dim": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
"""As in every published DeepSeek. Without scaling, vLLM 0.32 on a CPU rotates interleaved positions otherwise
than transformers does, in unquantized models too."""
_DEEPSEEK = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": _YARN}
_MIMO = {
    "num_key_value_heads": 1,
    "head_dim": 64,
    "v_head_dim": 32,
    "hybrid_layer_pattern": [0, 1, 0],
    "moe_layer_freq": [0, 1, 1],
    "layernorm_epsilon": 1e-5,
    "sliding_window_size": 64,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 64,
    "swa_v_head_dim": 32,
    "rope_theta": 5e6,
    "swa_rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "scoring_func": "sigmoid",
    "add_swa_attention_sink_bias": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}
_GEMMA_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 64,
    "default_output_length": 70,
}
_SPARSE = {"index_topk": 8, "indexer_types": ["full", "shared"]}
_SPARSE_3 = {"index_topk": 8, "indexer_types": ["full", "full", "shared"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "phimoe": {
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.01,
    },  # vLLM has them fixed
    "aria_text": {"num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1},
    "llama4": {"text_config": {"num_experts_per_tok": 1}},
    "llama4_text": {"num_experts_per_tok": 1},
    "lfm2_moe": {**_TWO_KINDS, "num_dense_layers": 1, "num_hidden_layers": 2},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE, "head_dim": 32, "use_qk_norm": False}},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "gemma4": {"text_config": {"enable_moe_block": True}, "vision_config": _GEMMA_TOWER},
    "gemma4_text": {"enable_moe_block": True},
    "diffusion_gemma": {"text_config": {"enable_moe_block": True}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [64, 64], "rope_parameters": _ERNIE_ROPE}},
    "qwen4_exp": {"text_config": _QWEN4, "vision_config": {"deepstack_visual_indexes": []}},
    "qwen4_exp_text": _QWEN4,
    "flint": {"mlp_only_layers": [0]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "doge": {"is_moe": True},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen3_omni_moe": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 64}, "spatial_merge_size": 2}
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 92},  # as published; generate() asks for it
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
            "index_kpool": 4,
            **_SPARSE_3,
        }
    },
    "hy_v4": _SPARSE_3,
    "hy_v4_vl": {"text_config": _SPARSE_3},
    "mistral_large4": {
        "text_config": {
            "index_topk": 8,
            "indexer_types": ["full", "shared"] * 3,
            "kv_source_layers": [0, 1, 1, 3, 4, 4],
        }
    },
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3},
    "step3p7": {"text_config": {"sliding_window": 64}},
    "deepseek_v4": {"head_dim": 512},
    # What published config.json files have, vLLM reads and transformers' class does not know.
    "deepseek_v2": {"rope_parameters": _YARN},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "glm_moe_dsa": {**_DEEPSEEK, **_SPARSE},
    "axk1": {**_DEEPSEEK, "mlp_layer_types": ["sparse"] * 2, "first_k_dense_replace": 0},
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {**_DEEPSEEK, "first_k_dense_replace": 1},
    "kimi_k25": {"text_config": _DEEPSEEK},
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "hy_v3": {"first_k_dense_replace": 1, "route_norm": True, "qk_norm": True, "expert_hidden_dim": 64},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "mistral4": {"qk_nope_head_dim": 512},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "mellum": {"num_nextn_predict_layers": 0},
    "mimo_v2_flash": _MIMO,
    "minimax_m2": {"rotary_dim": 32, "use_routing_bias": True, "scoring_func": "sigmoid"},
}
"""Model type -> entries of the config (of the text config, if it has one) that the sizes above do not fit."""
BFLOAT16 = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text")
"""Model types that vLLM on a CPU computes in bfloat16 alone (linear attention)."""
TOKENIZED = ("inkling_mm_model", "inkling_text")
"""Model types for which vLLM asks for a tokenizer."""
UNBIASED = {"ernie4_5_moe": "e_score_correction_bias"}
"""Model type -> what is in the names of tensors that get no random biases: vLLM 0.32's router on a CPU leaves
out such a bias of softmax scores without groups."""
