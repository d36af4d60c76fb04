"""Layers that vLLM makes of a checkpoint, compared with what was packed and with what the kernels compute."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.errors import CheckpointError, ConfigError


def check_experts(name: str, shape: LayerShape, moe: FusedMoEConfig, layer: Any) -> None:
    """Refuse experts of other sizes, and those that compute something else than packed ones.

    Args:
        name: of the layer in the manifest.
        shape: of the packed layer.
        moe: vLLM's sizes.
        layer: vLLM's experts.

    Raises:
        CheckpointError: other sizes.
        ConfigError: naming what they compute.
    """
    wanted = (moe.num_logical_experts, moe.hidden_dim, moe.intermediate_size)
    found = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
    if wanted != found:
        raise CheckpointError(
            f"{name}: the model has (experts, hidden_size, intermediate_size) = {wanted}, the "
            f"quantization_config {found}; config.json was altered"
        )
    if moe.num_experts < moe.num_logical_experts:
        raise ConfigError(
            f"{name}: config.json has {moe.num_logical_experts - moe.num_experts} of "
            f"{moe.num_logical_experts} experts replaced by constants (approximate_experts or "
            "expert_substitution), and all of them are packed; remove that entry"
        )
    _refuse_variants(name, moe, layer)
    fused = layer.expert_map_manager.num_fused_shared_experts
    if fused:  # their ids would be those after the last packed expert, which the kernels skip
        raise ConfigError(
            f"{name}: vLLM fused {fused} shared experts into the packed ones, where they would be left out; "
            "set VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"
        )


def _refuse_variants(name: str, moe: FusedMoEConfig, layer: Any) -> None:
    """Experts that compute something else than down(act(gate) * up), weighted on the way out."""
    variants = {
        "expert biases": moe.has_bias,
        "router weights applied to the input": layer.apply_router_weight_on_input,
        "clamped gating": any(
            getattr(layer, option, None) is not None
            for option in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
        ),
        "redundant copies of experts": moe.num_experts > moe.num_logical_experts,
    }
    found = [text for text, present in variants.items() if present]
    if found:
        raise ConfigError(f"{name}: bitsmoe cannot serve experts with {', '.join(found)}")


def check_online(prefix: str, layer: Any, online: Any) -> None:
    """Refuse to quantize packed experts once more while they are loaded.

    Args:
        prefix: vLLM's name of the layer.
        layer: vLLM's experts.
        online: what vLLM makes of ``--quantization-config``, None without.

    Raises:
        ConfigError: it is meant for these experts, too.
    """
    if online is not None and online.resolve_quant_method_cls(type(layer), prefix) is not None:
        raise ConfigError(
            f"--quantization-config would quantize the packed experts at {prefix} once more; give it "
            '"linear" alone, or name the experts under "ignore"'
        )


def most_tokens() -> int:
    """Of a call, as the engine that is being started will make it."""
    return get_current_vllm_config().scheduler_config.max_num_batched_tokens
