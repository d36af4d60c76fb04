"""What errors in the rows of a layer's factors cost at its output, to first order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.spectral.bases import Experts
from bitsmoe_plugin.spectral.error_feedback import Feedback
from bitsmoe_plugin.spectral.layer_feedback import rank_variances
from bitsmoe_plugin.spectral.layer_problem import LayerProblem


@dataclass(frozen=True)
class RowWeights:
    """What a unit of squared error in a factor's values costs at the layer's output, to first order.

    Attributes:
        neuron: ``[n, E, I]`` float32, of gate and up (n = 2), or up alone: importance of each neuron.
        hidden: ``[E, I]`` float32, variances of the hidden activations that down is multiplied with.
        rank: ``[1 or 2, E, r]`` float32, variances of what gate and up are multiplied with.
    """

    neuron: Tensor
    hidden: Tensor
    rank: Tensor

    def to(self, device: torch.device) -> RowWeights:
        """The same on a device."""
        return RowWeights(self.neuron.to(device), self.hidden.to(device), self.rank.to(device))

    def of(self, chosen: Experts, output_basis: Tensor) -> tuple[Tensor, Tensor]:
        """For all factors the weights within a row, ``[f, e, I]``, and of whole rows, ``[f, e, r]``.

        Args:
            output_basis: ``[H, r]``.
        """
        rank = self.rank[:, chosen]
        reach = output_basis.square().sum(0).expand(rank.shape[1], -1)
        return (
            torch.cat([self.neuron[:, chosen], self.hidden[None, chosen]]),
            torch.stack([*rank.expand(len(self.neuron), -1, -1), reach]),
        )


@span("costs")
def row_weights(problem: LayerProblem, known: dict[int, Feedback]) -> RowWeights:
    """Those of the rows of a layer.

    Args:
        known: see ``rank_variances``.
    """
    assert problem.hidden_moments is not None, "of a layer that is planned"
    return RowWeights(
        problem.statistics.neuron_weights, problem.hidden_moments.variance, rank_variances(problem, known)
    )
