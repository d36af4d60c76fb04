"""The weights and biases of a layer's routed experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts of one layer, in any float dtype.

    Attributes:
        gate: ``[num_experts, intermediate_size, hidden_size]``
        up: ``[num_experts, intermediate_size, hidden_size]``
        down: ``[num_experts, hidden_size, intermediate_size]``
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.gate.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.gate.shape[2]

    def numel(self) -> int:
        """Number of expert weights, the denominator of bits_per_weight."""
        return self.gate.numel() + self.up.numel() + self.down.numel()

    def every(self, stride: int) -> ExpertWeights:
        """Views of every ``stride``-th neuron."""
        return ExpertWeights(self.gate[:, ::stride], self.up[:, ::stride], self.down[..., ::stride])

    def to(self, device: torch.device) -> ExpertWeights:
        """The same on a device; no copy if they are there."""
        return ExpertWeights(self.gate.to(device), self.up.to(device), self.down.to(device))


@dataclass(frozen=True)
class ExpertBiases:
    """What the experts of some families add to their products; never quantized.

    Attributes:
        gate: ``[num_experts, intermediate_size]``
        up: ``[num_experts, intermediate_size]``
        down: ``[num_experts, hidden_size]``
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def add(self, gate: Tensor, up: Tensor, expert: int | Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up products ``[..., I]`` of one expert, or of one each ``[...]``, with their biases."""
        return gate + self.gate[expert].float(), up + self.up[expert].float()

    def to(self, device: torch.device) -> ExpertBiases:
        """The same on a device."""
        return ExpertBiases(self.gate.to(device), self.up.to(device), self.down.to(device))
