"""Packed experts under torch.func and forward-mode differentiation, which see through no operator of ours.

torch.func.grad and vjp work; torch.func.jvp, dual tensors and vmap are refused by torch, where a bare
operator would have tangents of zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitsmoe_plugin.runtime import operator


def active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def packed_experts(hidden: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], kind: str) -> Tensor:
    """See ``operator.packed_experts``."""
    return _Forward.apply(hidden, index, weights, kind, *packed)  # type: ignore[no-any-return]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, index: Tensor, weights: Tensor, kind: str, *packed: Tensor) -> Tensor:
        return operator.packed_experts(hidden, index, weights, list(packed), kind)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, index, weights, ctx.kind, *packed = inputs
        ctx.save_for_backward(hidden, index, weights, *packed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, index, weights, *packed = ctx.saved_tensors
        by_hidden, by_weights = _Backward.apply(*grads, hidden, index, weights, ctx.kind, *packed)
        return by_hidden, None, by_weights, None, *[None] * len(packed)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, kind: str, *packed: Tensor
    ) -> tuple[Tensor, Tensor]:
        return operator.packed_experts_backward(grad, hidden, index, weights, list(packed), kind)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        operator.refuse_second(ctx, *grads)
