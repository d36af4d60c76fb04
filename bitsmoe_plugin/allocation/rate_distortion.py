"""The rate-distortion bound that a layer's rows are measured against.

Rows are taken as independent Gaussian sources, a row of n values with total weighted energy v as
n values of variance v / n. Reverse water-filling (Cover and Thomas, theorem 10.3.3) gives the
least number of bits that any code needs to stay at a given total error.
"""

from __future__ import annotations

import torch
from torch import Tensor


def water_filling_bits(energies: Tensor, error: float, size: int) -> float:
    """Least total bits for rows of ``size`` values at a total weighted squared error.

    Args:
        energies: ``[...]`` weighted energy of each row: its error if it is dropped.
        error: total error that may remain, positive.
    """
    v = energies.flatten().double()
    v = v[v > 0].sort().values
    if len(v) == 0 or error >= float(v.sum()):
        return 0.0
    # At water level w the error is sum(min(v, w)): find the rows below the level, then the level.
    below = torch.cat([v.new_zeros(1), v.cumsum(0)])[:-1]
    above = torch.arange(len(v), 0, -1, dtype=torch.float64, device=v.device)
    first = int(torch.searchsorted(below + above * v, v.new_tensor(error)))
    level = (error - float(below[first])) / float(above[first])
    return float(0.5 * size * (v[first:] / level).log2().sum())
