"""Layers that vLLM makes of a checkpoint, compared with what was packed and with what the kernels compute."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError, ConfigError


def check_experts(name: str, spec: PackedSpec, moe: FusedMoEConfig, layer: Any) -> None:
    """Refuse experts of other sizes, and those that compute something else than packed ones.

    Args:
        name: of the layer in the manifest.
        spec: of the packed layer.
        moe: vLLM's sizes.
        layer: vLLM's experts.

    Raises:
        CheckpointError: other sizes.
        ConfigError: naming what they compute.
    """
    shape = spec.shape
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
    _refuse_variants(name, spec, moe, layer)
    fused = layer.expert_map_manager.num_fused_shared_experts
    if fused:  # their ids would be those after the last packed expert, which the kernels skip
        raise ConfigError(
            f"{name}: vLLM fused {fused} shared experts into the packed ones, where they would be left out; "
            "set VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"
        )


def _refuse_variants(name: str, spec: PackedSpec, moe: FusedMoEConfig, layer: Any) -> None:
    """Experts that compute something else than what was packed."""
    if moe.has_bias != spec.has_bias:
        raise CheckpointError(
            f"{name}: the model's experts have {_biases(moe.has_bias)}, the packed ones "
            f"{_biases(spec.has_bias)}; config.json was altered"
        )
    if layer.activation.is_gated != spec.shape.has_gate:
        raise CheckpointError(
            f"{name}: vLLM's experts have {_gate(layer.activation.is_gated)}, the packed ones "
            f"{_gate(spec.shape.has_gate)}; config.json was altered"
        )
    if layer.apply_router_weight_on_input and moe.experts_per_token != 1:
        raise ConfigError(
            f"{name}: router weights are applied to the inputs of {moe.experts_per_token} experts per token, "
            "so each has an input of its own; bitsmoe serves this with num_experts_per_tok=1"
        )
    if moe.num_experts > moe.num_logical_experts:
        raise ConfigError(f"{name}: bitsmoe cannot serve redundant copies of experts")


def _biases(present: bool) -> str:
    return "biases" if present else "no biases"


def _gate(present: bool) -> str:
    return "a gate" if present else "no gate"


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
