"""What a layer's experts compute by their declaration, and whether the module agrees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights
from bitsmoe_plugin.models.families import apply_gating, layout_of, read_biases

_AGREEMENT = 0.05
"""Relative difference at which a module computes something else than it declares; bfloat16 gives 0.01."""


def check_computation(
    name: str, module: Any, weights: ExpertWeights, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Compare what a module computes with what its layout says, on a few tokens.

    A class can follow the convention by its declaration and still compute something else.

    Args:
        inputs: from ``routed_inputs``, on any device.

    Raises:
        QuantizationError: naming the module.
    """
    if layout_of(module).takes_copies:  # an entry of ours, tested
        return
    hidden, index, share = (tensor[:4].to(module.down_proj.device) for tensor in inputs)
    found = module(hidden, index, share.to(hidden.dtype)).float()
    biases, wanted = read_biases(module), torch.zeros_like(found)
    for token, slot in torch.nonzero(index < weights.num_experts).tolist():
        expert, x = int(index[token, slot]), hidden[token].float()
        out = expert_output(module, weights, biases, expert, x)
        out = module.post_expert_norm(out) if layout_of(module).has_post_expert_norm else out
        wanted[token] += float(share[token, slot]) * out
    if layout_of(module).has_identity_experts:
        wanted += (share * (index >= weights.num_experts)).sum(-1, keepdim=True) * hidden.float()
    difference = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if difference > _AGREEMENT:
        raise QuantizationError(
            f"{name} ({type(module).__name__}) cannot be quantized: it declares the fused convention, but "
            f"computes something else (outputs differ by {100 * difference:.0f} %)"
        )


def expert_output(
    module: Any, weights: ExpertWeights, biases: ExpertBiases | None, expert: int, x: Tensor
) -> Tensor:
    """Output ``[..., H]`` float32 of one expert for inputs ``[..., H]`` alike, before any norm of it."""
    products = tuple(x @ matrix[expert].float().T for matrix in weights.inputs)
    if biases is not None:
        products = biases.add(*products, expert=expert)
    out = apply_gating(module, *products) @ weights.down[expert].float().T
    return out if biases is None else out + biases.down[expert].float()
