"""``bitsmoe::packed_experts``: packed experts as one operator of torch, for everything that traces models.

torch.compile, torch.export, torch.jit.trace, autograd and activation checkpointing see one operation whose
inputs are the packed tensors themselves, so none of them keeps a state that could be stale. Forward by the
fastest kernels (``dispatch.prepare``), backward by ``runtime.gradients``; both run below autograd and
autocast, in the precision that they choose themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.runtime.gradients import gradients
from bitsmoe_plugin.runtime.layer_kind import LayerKind
from bitsmoe_plugin.runtime.layer_states import STATES

# Operators live as long as their library. A fragment: others, of vLLM's plugin, have the same namespace.
_LIBRARY = Library("bitsmoe", "FRAGMENT")
_INPUTS = "Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor[] packed, str kind"
_TAGS = (torch.Tag.pt2_compliant_tag,)


@contextmanager
def _own_precision(device: torch.device) -> Iterator[None]:
    """Products of ours are not cast by autocast."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def _check_call(
    hidden: Tensor, index: Tensor, weights: Tensor, packed: Sequence[Tensor], kind: LayerKind
) -> None:
    """Refuse shapes that would have kernels read what is not there."""
    size = kind.spec.shape.hidden_size
    if hidden.dim() != 2 or hidden.shape[1] != size:
        raise ValueError(f"hidden states are {list(hidden.shape)}, packed experts take [tokens, {size}]")
    if index.dim() != 2 or index.shape != weights.shape or len(index) != len(hidden):
        raise ValueError(
            f"top_k_index is {list(index.shape)}, top_k_weights {list(weights.shape)} for {len(hidden)} "
            "tokens; both are [tokens, experts per token]"
        )
    if not hidden.device == index.device == weights.device == packed[0].device:
        raise ValueError(
            f"hidden states are on {hidden.device}, top_k_index on {index.device}, top_k_weights on "
            f"{weights.device}, the packed experts on {packed[0].device}; move the model to one device"
        )


def routed_only(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """``forward`` of the tokens whose first expert is not negative, zero for the others."""
    tokens = torch.nonzero(index[:, 0] >= 0).flatten()
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    out[tokens] = forward(hidden[tokens], index[tokens], weights[tokens])
    return out


def _forward(hidden: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], kind: str) -> Tensor:
    layer = LayerKind.parse(kind)
    _check_call(hidden, index, weights, packed, layer)
    with _own_precision(hidden.device):
        runtime = STATES.of(kind, packed, len(hidden)).runtime
        if layer.takes_copies:
            return routed_only(runtime.forward, hidden, index, weights)
        return runtime.forward(hidden.contiguous(), index, weights)


def _backward(
    grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], kind: str
) -> tuple[Tensor, Tensor]:
    layer = LayerKind.parse(kind)
    _check_call(hidden, index, weights, packed, layer)
    with _own_precision(hidden.device), torch.no_grad():
        reference = STATES.of(kind, packed, len(hidden)).reference
        if not layer.takes_copies:
            return gradients(reference, grad, hidden, index, weights)
        tokens = torch.nonzero(index[:, 0] >= 0).flatten()
        by_hidden, by_weights = (
            torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (hidden, weights)
        )
        inputs = (tensor[tokens] for tensor in (grad, hidden, index, weights))
        by_hidden[tokens], by_weights[tokens] = gradients(reference, *inputs)
        return by_hidden, by_weights


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_forward(hidden: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], kind: str) -> Tensor:
    if hidden.device.type != "meta" and any(tensor.device.type == "meta" for tensor in packed):
        raise CheckpointError(
            "the packed experts are on the meta device, hidden states are not: their tensors were not loaded"
        )
    return _like(hidden)


def _fake_backward(
    grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, packed: list[Tensor], kind: str
) -> tuple[Tensor, Tensor]:
    return _like(hidden), _like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, index, weights, packed, ctx.kind = inputs
    ctx.save_for_backward(hidden, index, weights, *packed)


def _pull_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, index, weights, *packed = ctx.saved_tensors
    by_hidden, by_weights = packed_experts_backward(grad, hidden, index, weights, packed, ctx.kind)
    needed = ctx.needs_input_grad
    return (
        by_hidden if needed[0] else None,
        None,
        by_weights if needed[2] else None,
        [None] * len(packed),
        None,
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def refuse_second(ctx: Any, *grads: Tensor) -> None:
    """Backward of the backward pass."""
    raise NotImplementedError(
        "packed experts have first derivatives only; for second ones (create_graph=True) use the "
        "unquantized model"
    )


def _register(name: str, schema: str, compute: Any, fake: Any, save: Any, pull_back: Any) -> Any:
    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitsmoe::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"bitsmoe::{name}", pull_back, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.bitsmoe, name).default


packed_experts_backward = _register(
    "packed_experts_backward",
    f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    _save_nothing,
    refuse_second,
)
packed_experts = _register(
    "packed_experts", f"({_INPUTS}) -> Tensor", _forward, _fake_forward, _save, _pull_back
)
"""(hidden ``[T, H]``, top_k_index ``[T, k]``, top_k_weights ``[T, k]``, tensors in the order of
``PackedSpec.tensors``, text of a ``LayerKind``) -> ``[T, H]`` in the dtype of ``hidden``."""
