"""What an expert computes for some tokens, and how much it matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import Operand, product, rows
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights
from bitsmoe_plugin.models.gating import Gating


@dataclass(frozen=True)
class ExpertActivity:
    """Attributes:
    hidden: ``[n, I]`` float32, exact hidden activations.
    importance: of gate and up, or of up alone, ``[n, I]`` float32: q of the module text of ``statistics``.
    """

    hidden: Tensor
    importance: tuple[Tensor, ...]


def _products(
    weights: ExpertWeights, biases: ExpertBiases | None, inputs: Operand, expert: int
) -> tuple[Tensor, ...]:
    """Of gate and up, or of up alone, ``[n, I]`` float32."""
    products = tuple(product(inputs, rows(matrix[expert])) for matrix in weights.inputs)
    return products if biases is None else biases.add(*products, expert=expert)


@span("statistics")
def hidden_activations(
    weights: ExpertWeights, biases: ExpertBiases | None, gating: Gating, inputs: Operand, expert: int
) -> Tensor:
    """``ExpertActivity.hidden`` alone, of ``linalg.rows`` of the inputs ``[n, H]``."""
    return gating(*_products(weights, biases, inputs, expert))


@span("statistics")
def expert_activity(
    weights: ExpertWeights, biases: ExpertBiases | None, gating: Gating, inputs: Operand, expert: int
) -> ExpertActivity:
    """Of ``linalg.rows`` of the inputs ``[n, H]``."""
    hidden, *slopes = _gating_with_slopes(gating, *_products(weights, biases, inputs, expert))
    reach = weights.down[expert].float().square().sum(0) / weights.hidden_size
    return ExpertActivity(hidden, tuple(slope.square_().mul_(reach) for slope in slopes))


def _gating_with_slopes(gating: Gating, *products: Tensor) -> tuple[Tensor, ...]:
    """hidden, and its slope by each of the products (gate and up, or up), all ``[n, I]``."""
    with torch.enable_grad():
        products = tuple(product.detach().requires_grad_() for product in products)
        hidden = gating(*products)
        slopes = torch.autograd.grad(hidden.sum(), products)
    return hidden.detach(), *slopes
