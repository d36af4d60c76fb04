"""Experts whose outputs are normed one by one, before the router weights them (Muse-Spark).

To first order a norm passes a small change on times a gain, which differs between tokens and experts. With
the gains in the router's weights, such a layer is one like any other to all that counts errors. They are
measured, by changing outputs, as in ``residual_gain``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from bitsmoe_plugin.calibration.activations import LayerActivations, routed_slots
from bitsmoe_plugin.models.declared_computation import expert_output
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights
from bitsmoe_plugin.models.families import layout_of

_STEP = 0.1
"""Size of a change over that of the output. A norm answers with 0.995 of its slope."""


@torch.no_grad()
def through_norm(
    experts: nn.Module, weights: ExpertWeights, biases: ExpertBiases | None, activations: LayerActivations
) -> LayerActivations:
    """Activations whose router weights make an error of an expert that of what the layer puts out.

    Args:
        experts: the module, for its gating and norm.
    """
    if not layout_of(experts).has_post_expert_norm:
        return activations
    device = activations.hidden.device
    direction = torch.randn(weights.hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
    direction = (direction * (len(direction) ** 0.5 / direction.norm())).to(device)
    gains = torch.ones_like(activations.top_k_weights)
    for expert, (token, slot) in enumerate(routed_slots(activations, weights.num_experts)):
        out = expert_output(experts, weights, biases, expert, activations.hidden[token].float())
        size = _STEP * out.square().mean(-1, keepdim=True).sqrt()
        change = experts.post_expert_norm(out + size * direction) - experts.post_expert_norm(out)  # type: ignore[operator]
        gain = change.square().mean(-1).sqrt() / size[:, 0]
        gains[token, slot] = gain.where(size[:, 0] > 0, 1.0)
    return replace(activations, top_k_weights=activations.top_k_weights * gains)
