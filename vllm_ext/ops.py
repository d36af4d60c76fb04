"""The custom operator that keeps torch.compile out of the experts, and the choice of their kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from bitsmoe_plugin.errors import ConfigError

# Operators live as long as their library.
_LIBRARY = Library("bitsmoe", "FRAGMENT")


def _routed_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    runner = get_forward_context().no_compile_layers[layer_name]
    return runner.routed_experts.quant_method.forward(x, topk_weights, topk_ids)


def _routed_experts_fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op(
    "routed_experts", _routed_experts, fake_impl=_routed_experts_fake, target_lib=_LIBRARY
)
routed_experts = torch.ops.bitsmoe.routed_experts
"""(x ``[T, H]``, topk_weights ``[T, k]``, topk_ids ``[T, k]``, name of the layer) -> ``[T, H]``."""


def check_platform(name: str) -> None:
    """The one place where the path is chosen: the reference in torch, until there are others.

    Raises:
        ConfigError: the reference path reads tensors back to the host, which a CUDA graph cannot hold.
    """
    if not current_platform.is_cpu() and not get_current_vllm_config().model_config.enforce_eager:
        raise ConfigError(
            f"{name}: this release has no GPU kernels for bitsmoe, and its path in plain torch cannot run "
            "inside CUDA graphs; start vLLM with --enforce-eager"
        )
