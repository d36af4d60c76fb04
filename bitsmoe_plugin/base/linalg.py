"""Matrix products and Cholesky factors, where most of the time goes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

_MULTIPLE = 64
"""Token counts are filled up to a multiple: oneDNN compiles, and keeps, a kernel for every shape."""

_BLOCK = 256
_SQUARE = 512
"""Rows of a symmetric product that are multiplied at once."""

_FLOAT32_FROM = 512
"""Dimensions from which eigenvectors take long (2048: 1.7 s of one core in float64, 0.75 in float32)."""


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``, ``[m, k]``, of float32 matrices ``[m, n]`` and ``[k, n]``.

    torch itself multiplies float32 matrices with MKL, which reaches half of oneDNN's speed on processors
    of AMD (98 against 220 billion operations per second on one core of Zen 5).
    """
    if a.device.type != "cpu" or not _has_onednn() or not a.numel():
        return a @ b.T
    filled = pad(a, (0, 0, 0, -len(a) % _MULTIPLE)) if len(a) % _MULTIPLE else a.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(filled, b.contiguous(), None, "none", [], "")
    return result[: len(a)]


def weighted_columns(a: Tensor, weights: Tensor) -> Tensor:
    """``[m, n or a little more]``: the columns are the rows of float32 ``[n, m]``, times the roots of their
    weights, which are not negative, and zeros."""
    missing = (0, -len(weights) % _MULTIPLE)
    return pad(a.T, missing).contiguous().mul_(pad(weights.sqrt(), missing))


def second_moment(a: Tensor, weights: Tensor) -> Tensor:
    """``sum_n weights[n] a[n] a[n]^T``, ``[m, m]``, of float32 ``[n, m]`` and weights of at least 0."""
    return squared(weighted_columns(a, weights))


def squared(a: Tensor) -> Tensor:
    """``a a^T`` of float32 ``[m, n]``; on the CPU of large ones only one half is multiplied."""
    return symmetric_product(a, a)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` of float32 ``[m, n]`` each, where it is symmetric; on the CPU of large ones only one half is
    multiplied."""
    m = len(a)
    if a.device.type != "cpu" or m < 2 * _SQUARE:
        return product(a, b)
    result = a.new_empty(m, m)
    for first in range(0, m, _SQUARE):
        last = min(first + _SQUARE, m)
        part = product(a[first:last], b[first:])
        result[first:last, first:], result[last:, first:last] = part, part[:, last - first :].T
    return result


def principal_directions(matrix: Tensor) -> Tensor:
    """Eigenvectors ``[n, n]`` float64 of a symmetric float64 matrix, as columns by rising eigenvalue.

    From ``_FLOAT32_FROM`` dimensions on in float32, which halves the time: orthonormal all the same, to about
    1e-6, and what they leave of ``matrix`` off the diagonal is about 1e-6 of its largest eigenvalue.
    """
    if len(matrix) < _FLOAT32_FROM:
        return torch.linalg.eigh(matrix)[1]
    unit = matrix.diagonal().abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.eigh((matrix / unit).float())[1].double()


def weighted_products(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """``sum_n weights[n] a[n] b[n]^T``, ``[m, k]``, of float32 ``[n, m]`` and ``[n, k]``."""
    missing = (0, -len(weights) % _MULTIPLE)
    right = pad(b.T, missing).contiguous()
    # Transposing takes longer than weighting, so it is done once where once is enough.
    left = right if a is b else pad(a.T, missing).contiguous()
    return product(left * pad(weights, missing), right)


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
