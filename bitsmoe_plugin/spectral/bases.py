"""Shared bases of one MoE layer, and the experts' factors in them.

With C the routing- and token-weighted second moment of the layer's inputs, the input basis
consists of the principal directions of the experts' gate and up weights *in the metric of C*
(activation whitening, as SVD-LLM, arXiv 2403.07378, does for truncation; BitsMoE, arXiv
2606.00079, uses the plain SVD). The output basis consists of the principal directions of the
experts' outputs. Both bases are quantized first and the factors are computed with the inverse
of the *quantized* basis, so that the bases' rounding error does not reach the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import (
    Operand,
    columns,
    congruent,
    principal_directions,
    product,
    rows,
)
from bitsmoe_plugin.base.scratch import Scratch
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.codec.basis import QuantizedBasis
from bitsmoe_plugin.models.expert_weights import ExpertWeights

_LEAST_EIGENVALUE = 1e-12
"""Of an input's second moment that would otherwise not be positive definite, relative to the mean."""


@dataclass(frozen=True)
class SharedBases:
    """Attributes:
    input_basis: ``[bases * rank, hidden_size]``, bases = 1 for gate and up together, or 2 for gate
        above up; z = input_basis x.
    output_basis: ``[hidden_size, rank]``; y = output_basis c.
    """

    input_basis: QuantizedBasis
    output_basis: QuantizedBasis

    def to(self, device: torch.device) -> SharedBases:
        """The same on a device."""
        return SharedBases(
            *(
                replace(basis, codes=basis.codes.to(device), scales=basis.scales.to(device))
                for basis in (self.input_basis, self.output_basis)
            )
        )

    def input_bases(self) -> Tensor:
        """``[bases, rank, hidden_size]`` float32, dequantized."""
        basis = self.input_basis.dequantize()
        return basis.view(-1, basis.shape[1], basis.shape[1])


def shrink(second_moment: Tensor, amount: float) -> Tensor:
    """Blend ``[..., n, n]`` with its mean eigenvalue times the identity (Ledoit and Wolf, 2004)."""
    n = second_moment.shape[-1]
    mean = second_moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(n, dtype=second_moment.dtype, device=second_moment.device)
    return (1 - amount) * second_moment + amount * mean * eye


def input_basis(gram: Tensor, second_moment: Tensor) -> Tensor:
    """Principal directions of the gate and up weights in the metric of their inputs.

    Args:
        gram: ``[hidden_size, hidden_size]`` float64, the sum over experts and neurons of
            weight * w w^T for the rows w of gate and up.
        second_moment: ``[hidden_size, hidden_size]`` float64, C, positive definite. The identity
            gives the plain orthogonal basis of the publication.

    Returns:
        ``[rank, hidden_size]`` float64, rank = hidden_size, rows V^T C^(-1/2) scaled to unit
        length (V: eigenvectors of C^(1/2) gram C^(1/2)), by rising energy: rows are rounded in
        this order, so what coarse rows lose can be made up for by the strong ones after them.
    """
    # C^(1/2) may be any L with L L^T = C.
    root = _root(second_moment)
    directions = principal_directions(congruent(root.T, gram))
    basis = torch.linalg.solve_triangular(root.T, directions, upper=True).T
    return basis / basis.norm(dim=-1, keepdim=True)


def _root(second_moment: Tensor) -> Tensor:
    """Lower triangular root of a second moment, of one without full rank with a little on its diagonal."""
    root, info = torch.linalg.cholesky_ex(second_moment)
    if not int(info):
        return root
    floor = second_moment.diagonal().mean() * _LEAST_EIGENVALUE
    return torch.linalg.cholesky(second_moment + torch.diag(floor.expand(len(second_moment))))


def output_basis(output_moment: Tensor) -> Tensor:
    """``[hidden_size, rank]`` float64: eigenvectors of the experts' output second moment
    ``[hidden_size, hidden_size]``, as columns by rising energy."""
    return principal_directions(output_moment)


@dataclass(frozen=True)
class BasisInverses:
    """Inverses of the bases as they are stored, float32.

    Attributes:
        given: ``[1 or 2, hidden_size, rank]``, of the input bases; the first is of gate, the last of up.
        output: ``[rank, hidden_size]``
    """

    given: Tensor
    output: Tensor

    @cached_property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """What rows of gate, rows of up and columns of down are multiplied with."""
        gate = rows(self.given[0].T)
        return gate, rows(self.given[-1].T) if len(self.given) > 1 else gate, rows(self.output)

    @staticmethod
    def of(bases: SharedBases) -> BasisInverses:
        """Computed in float64, one by one: a batch of them makes MKL fail or hang with several threads
        (torch 2.13, two matrices of 2048)."""
        return BasisInverses(
            torch.stack([torch.linalg.inv(basis.double()).float() for basis in bases.input_bases()]),
            torch.linalg.inv(bases.output_basis.dequantize().double()).float(),
        )


Experts = slice | list[int]


@span("factors")
def input_factors(weights: ExpertWeights, inverses: BasisInverses, experts: Experts) -> Tensor:
    """Factors ``[n, e, rank, I]`` float32 that reproduce gate and up (n = 2), or up alone, exactly in the
    quantized bases: gate = factor^T input_basis."""
    return _new_factors(weights, inverses, experts, weights.inputs)


@span("factors")
def down_factors(weights: ExpertWeights, inverses: BasisInverses, experts: Experts) -> Tensor:
    """Factors ``[e, rank, I]`` float32 that reproduce down exactly: down = output_basis factor."""
    return _new_factors(weights, inverses, experts, (weights.down,))[0]


@span("factors")
def all_factors(
    weights: ExpertWeights,
    inverses: BasisInverses,
    experts: Experts,
    neurons: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Both, ``[n + 1, e, rank, I]``.

    Args:
        neurons: ``[n + 1, e, k]`` int64: those of each factor and expert instead of all I.
        scratch: where to, as "factors".
    """
    wanted = (*weights.inputs, weights.down)
    return _new_factors(weights, inverses, experts, wanted, neurons, scratch)


def _new_factors(
    weights: ExpertWeights,
    inverses: BasisInverses,
    experts: Experts,
    wanted: Sequence[Tensor],
    neurons: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Of the ``wanted`` matrices of the weights."""
    ids = expert_ids(weights, experts)
    count = weights.intermediate_size if neurons is None else neurons.shape[-1]
    shape = len(wanted), len(ids), weights.hidden_size, count
    result = (scratch or Scratch()).empty("factors", weights.up, shape, torch.float32)
    gate, up, down = inverses.operands
    for f, matrices in enumerate(wanted):
        is_down = matrices is weights.down
        left = down if is_down else up if matrices is weights.up else gate
        for e, expert in enumerate(ids):
            matrix = matrices[expert]
            if neurons is not None:
                matrix = matrix[:, neurons[f, e]] if is_down else matrix[neurons[f, e]]
            product(left, columns(matrix) if is_down else rows(matrix), out=result[f, e])
    return result


def expert_ids(weights: ExpertWeights, experts: Experts) -> Sequence[int]:
    """Of some experts, or of those of a slice."""
    return range(weights.num_experts)[experts] if isinstance(experts, slice) else experts
