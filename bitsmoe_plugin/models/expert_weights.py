"""The weights and biases of a layer's routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.codec.layout import LayerShape


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts of one layer, in any float dtype.

    Attributes:
        gate: ``[num_experts, intermediate_size, hidden_size]``, None of experts without one
        up: ``[num_experts, intermediate_size, hidden_size]``
        down: ``[num_experts, hidden_size, intermediate_size]``
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor

    @staticmethod
    def of(inputs: Sequence[Tensor], down: Tensor) -> ExpertWeights:
        """From gate and up, or up alone, and down."""
        return ExpertWeights(inputs[0] if len(inputs) > 1 else None, inputs[-1], down)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What reads the hidden states: gate and up, or up alone."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.num_experts, self.hidden_size, self.intermediate_size, self.gate is not None)

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.up.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.up.shape[2]

    def numel(self) -> int:
        """Number of expert weights, the denominator of bits_per_weight."""
        return sum(matrix.numel() for matrix in (*self.inputs, self.down))

    def every(self, stride: int) -> ExpertWeights:
        """Views of every ``stride``-th neuron."""
        return ExpertWeights.of([w[:, ::stride] for w in self.inputs], self.down[..., ::stride])

    def to(self, device: torch.device) -> ExpertWeights:
        """The same on a device; no copy if they are there."""
        return ExpertWeights.of([w.to(device) for w in self.inputs], self.down.to(device))


@dataclass(frozen=True)
class ExpertBiases:
    """What the experts of some families add to their products; never quantized.

    Attributes:
        gate: ``[num_experts, intermediate_size]``, None of experts without a gate
        up: ``[num_experts, intermediate_size]``
        down: ``[num_experts, hidden_size]``
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor

    @staticmethod
    def of(inputs: Sequence[Tensor], down: Tensor) -> ExpertBiases:
        """From those of gate and up, or up alone, and of down."""
        return ExpertBiases(inputs[0] if len(inputs) > 1 else None, inputs[-1], down)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Of gate and up, or of up alone."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def add(self, *products: Tensor, expert: int | Tensor) -> tuple[Tensor, ...]:
        """Products ``[..., I]`` of gate and up, or up alone, with the biases of an expert, or one each."""
        return tuple(x + bias[expert].float() for x, bias in zip(products, self.inputs, strict=True))

    def every(self, stride: int) -> ExpertBiases:
        """Views of every ``stride``-th neuron's."""
        return ExpertBiases.of([bias[:, ::stride] for bias in self.inputs], self.down)

    def to(self, device: torch.device) -> ExpertBiases:
        """The same on a device."""
        return ExpertBiases.of([bias.to(device) for bias in self.inputs], self.down.to(device))
