"""Error feedback: what of a row's or column's error later ones can make up for, from second moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import upper_root


@dataclass(frozen=True)
class Feedback:
    """Second moments C = unit diag(variance) unit^T of what a factor's rows or columns are multiplied with.

    With d the errors (row minus value) of the rows rounded so far, row k is rounded to make up for
    them, that is, towards row + unit[:k, k]^T d; what is left of its target costs variance[k] per square:
    what the later coordinates do not explain of coordinate k.
    (QuIP's form of the feedback, arXiv 2307.13304; GPTQ's, from the inverse of C, has the same targets.)

    Attributes:
        unit: ``[..., n, n]`` float32, upper triangular, ones on the diagonal; None: errors are not passed on.
        variance: ``[..., n]`` float32.
    """

    unit: Tensor | None
    variance: Tensor

    @staticmethod
    def of(moments: Tensor, damping: float | list[float]) -> Feedback:
        """Of damped second moments ``[..., n, n]``; ``damping`` is the share of the mean diagonal added, to
        all or to each."""
        n = moments.shape[-1]
        units, variances = [], []
        flat = moments.reshape(-1, n, n)
        shares = damping if isinstance(damping, list) else [damping] * len(flat)
        for matrix, share in zip(flat, shares, strict=True):
            diagonal = matrix.diagonal()
            floor = share * diagonal.mean().clamp_min(1e-30)
            root = upper_root(matrix + torch.diag(floor.expand(n)))
            scale = root.diagonal().clone()
            units.append(root.div_(scale))
            variances.append(scale.square_())
        shape = moments.shape[:-2]
        return Feedback(torch.stack(units).view(moments.shape), torch.stack(variances).view(*shape, n))

    @staticmethod
    def none(diagonal: Tensor, damping: float) -> Feedback:
        """Of the diagonals ``[..., n]`` of the moments alone: errors are not passed on."""
        return Feedback(None, diagonal + damping * diagonal.mean(-1, keepdim=True).clamp_min(1e-30))

    def __getitem__(self, index: Any) -> Feedback:
        """Of some of the experts."""
        return Feedback(None if self.unit is None else self.unit[index], self.variance[index])


def stacked_feedback(parts: list[Feedback], dim: int = 0) -> Feedback:
    """Several as one, along a new axis."""
    units = [f.unit for f in parts if f.unit is not None]
    variance = torch.stack([f.variance for f in parts], dim)
    return Feedback(torch.stack(units, dim) if units else None, variance)
