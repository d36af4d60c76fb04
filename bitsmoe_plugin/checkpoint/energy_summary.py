"""A layer's spectrum in a few numbers, small enough for the manifest of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 32
"""Per projection. The manifest of 48 layers then grows by about 50 kB."""


def rank_bins(values: Tensor) -> list[Tensor]:
    """The last axis, ranks from weak to strong, in at most ``BINS`` pieces of about equal size."""
    return list(torch.tensor_split(values, min(BINS, values.shape[-1]), dim=-1))


def spectrum(energies: Tensor, others: Tensor) -> list[list[float]]:
    """Energy along the ranks, summed over experts and the ranks of a bin; four significant digits.

    Args:
        energies: ``[f, E, r]`` float32, output error of dropping each row of each factor, in the unit
            of ``output_energy``.
        others: ``[E]`` bool, experts that have rows.

    Returns:
        ``[f][bins]``, weak ranks first.
    """
    bins = torch.stack([piece.double().sum((1, 2)) for piece in rank_bins(energies[:, others])], 1)
    return [[float(f"{energy:.4g}") for energy in factor] for factor in bins.tolist()]
