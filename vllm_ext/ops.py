"""The custom operator that keeps torch.compile out of the experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

# Operators live as long as their library.
_LIBRARY = Library("bitsmoe", "FRAGMENT")


def _routed_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    runner = get_forward_context().no_compile_layers[layer_name]
    out: Tensor = runner.routed_experts.quant_method.forward(x.contiguous(), topk_weights, topk_ids)
    return out.contiguous()


def _routed_experts_fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


direct_register_custom_op(
    "routed_experts",
    _routed_experts,
    fake_impl=_routed_experts_fake,
    target_lib=_LIBRARY,
    # A compiler that lays tensors out otherwise than the fake said would make it lie.
    tags=(torch.Tag.needs_exact_strides,),
)
routed_experts = torch.ops.bitsmoe.routed_experts
"""(x ``[T, H]``, topk_weights ``[T, k]``, topk_ids ``[T, k]``, name of the layer) -> ``[T, H]``, contiguous
whatever the strides of x."""
