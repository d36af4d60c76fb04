"""Cholesky factors in float32, block column after block column."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.base.linalg import product

_BLOCK = 256


def upper_root(matrix: Tensor) -> Tensor:
    """Upper triangular U ``[n, n]`` with U U^T = a float32 matrix, symmetric and positive definite.

    In products of float32 (a quarter of LAPACK's time in float64 at n = 2048); the error of an entry is that
    of the entry of the matrix relative to the root of its row's and column's diagonals. A matrix that is
    not positive definite after rounding is factored in float64, and so is all on a GPU, where blocks
    would have to be waited for.

    Raises:
        torch.linalg.LinAlgError: not positive definite in float64 either.
    """
    root = _blocked(matrix) if matrix.device.type == "cpu" else None
    return _exact(matrix) if root is None else root


def _exact(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1).float()


def _blocked(matrix: Tensor) -> Tensor | None:
    """None if it is not positive definite. Goes from the last block column to the first."""
    n = len(matrix)
    root = torch.zeros_like(matrix)
    for last in range(n, 0, -_BLOCK):
        first = max(last - _BLOCK, 0)
        column = matrix[:last, first:last]
        if last < n:
            column = column - product(root[:last, last:], root[first:last, last:])
        corner, info = torch.linalg.cholesky_ex(column[first:].double().flip(0, 1))
        if bool(info):
            return None
        corner = corner.flip(0, 1)
        root[first:last, first:last] = corner
        if first:
            eye = torch.eye(last - first, dtype=corner.dtype, device=corner.device)
            inverse = torch.linalg.solve_triangular(corner, eye, upper=True).float()
            root[:first, first:last] = product(column[:first], inverse)
    return root
