"""Matrix products and Cholesky factors, where most of the time goes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitsmoe_plugin.base.integer_products import Stripes, available, multiplied, packed_columns, packed_rows

_MULTIPLE = 64
"""Token counts are filled up to a multiple: oneDNN compiles, and keeps, a kernel for every shape."""

_BLOCK = 256
_SQUARE = 512
"""Rows of a symmetric product that are multiplied at once."""

_FLOAT32_FROM = 512
"""Dimensions from which float64 takes long (eigenvectors of 2048: 1.7 s of one core, 0.75 in float32)."""


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


Operand = Tensor | Stripes
"""A matrix, or what it was packed to: what is multiplied more than once is packed once."""


def rows(a: Tensor, index: Tensor | None = None) -> Operand:
    """Rows of ``[n, m]`` in any float dtype, all or those of ``index``, to be multiplied."""
    if available(a.device):
        return packed_rows(a, index)
    return (a if index is None else a[index]).float()


def columns(a: Tensor, weights: Tensor | None = None, index: Tensor | None = None) -> Operand:
    """Columns of ``[n, m]`` in any float dtype, or of its rows ``index``, to be multiplied: ``[m, n]``.

    Args:
        weights: ``[n]``, not negative, whose roots the rows of ``a`` are multiplied with.
    """
    root = None if weights is None else weights.sqrt()
    if available(a.device):
        return packed_columns(a, root, index)
    chosen = (a if index is None else a[index]).float().T
    return chosen.contiguous() if root is None else chosen * root


def product(a: Operand, b: Operand, out: Tensor | None = None) -> Tensor:
    """``a b^T``, ``[m, k]`` float32, of ``[m, n]`` and ``[k, n]``; in 16-bit integers where the CPU has them
    (``integer_products``), to 3e-4 of what random rows of these lengths have.

    Args:
        out: where to, contiguous.
    """
    if isinstance(a, Stripes) or isinstance(b, Stripes) or available(a.device):
        return multiplied(_packed(a), _packed(b), out=out)
    result = float_product(a, b)
    return result if out is None else out.copy_(result)


def _packed(a: Operand) -> Stripes:
    return a if isinstance(a, Stripes) else packed_rows(a)


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """``product`` in float32.

    torch itself multiplies float32 matrices with MKL, which reaches half of oneDNN's speed on processors
    of AMD (98 against 220 billion operations per second on one core of Zen 5).
    """
    if a.device.type != "cpu" or not _has_onednn() or not a.numel():
        return a @ b.T
    columns, rows = -a.shape[1] % _MULTIPLE, -len(a) % _MULTIPLE
    filled = pad(a, (0, columns, 0, rows)) if columns or rows else a.contiguous()
    other = pad(b, (0, columns)) if columns else b.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(filled, other, None, "none", [], "")
    return result[: len(a)]


def second_moment(a: Tensor, weights: Tensor, index: Tensor | None = None) -> Tensor:
    """``sum_n weights[n] a[n] a[n]^T``, ``[m, m]`` float32, of ``[n, m]`` or its rows ``index``; no weight is
    negative."""
    return squared(columns(a, weights, index))


def squared(a: Operand) -> Tensor:
    """``a a^T`` of ``[m, n]``; on the CPU of large ones only one half is multiplied."""
    return symmetric_product(a, a)


def symmetric_product(a: Operand, b: Operand) -> Tensor:
    """``a b^T`` of ``[m, n]`` each, where it is symmetric; on the CPU of large ones only one half is
    multiplied."""
    if isinstance(a, Stripes) or isinstance(b, Stripes) or available(a.device):
        left = _packed(a)
        return multiplied(left, left if b is a else _packed(b), symmetric=True)
    return _symmetric_float_product(a, b)


def _symmetric_float_product(a: Tensor, b: Tensor) -> Tensor:
    """``symmetric_product`` in float32."""
    m = len(a)
    if a.device.type != "cpu" or m < 2 * _SQUARE:
        return float_product(a, b)
    result = a.new_empty(m, m)
    for first in range(0, m, _SQUARE):
        last = min(first + _SQUARE, m)
        part = float_product(a[first:last], b[first:])
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


def congruent(a: Tensor, matrix: Tensor) -> Tensor:
    """``a matrix a^T`` ``[m, m]`` float64 of float64 ``[m, n]`` and symmetric ``[n, n]``.

    From ``_FLOAT32_FROM`` dimensions on in float32: an entry is off by about 1e-6 of
    ``|a_i| |matrix| |a_j|``, with the norms of two rows of ``a``.
    """
    if len(matrix) < _FLOAT32_FROM:
        return a @ matrix @ a.T
    tiny = torch.finfo(torch.float64).tiny
    unit, size = (x.abs().amax().clamp_min(tiny) for x in (a, matrix))
    sides = (a / unit).float()
    result = float_product(float_product(sides, (matrix / size).float()), sides).double()
    return (result + result.T).mul_(unit.square() * size / 2)


def projected_moment(a: Tensor, moment: Tensor) -> Tensor:
    """``a moment a^T`` ``[m, m]`` float32 of float32 ``[m, n]`` and a positive semidefinite float64
    ``[n, n]``: the second moment of a x where ``moment`` is that of x.

    From ``_FLOAT32_FROM`` dimensions on by products in float32 with its root, if it has one: of fewer tokens
    than dimensions, rounding makes some eigenvalues negative. With the moment itself, whose largest
    eigenvalue may be millions of times what some rows of ``a`` see, they would leave nothing of these.
    """
    if len(moment) >= _FLOAT32_FROM:
        root, info = torch.linalg.cholesky_ex(moment)
        if not int(info):
            seen = float_product(a, root.float().T)
            return _symmetric_float_product(seen, seen)
    exact = a.double()
    return (exact @ moment @ exact.T).float()


def weighted_products(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """``sum_n weights[n] a[n] b[n]^T``, ``[m, k]``, of float32 ``[n, m]`` and ``[n, k]``."""
    missing = (0, -len(weights) % _MULTIPLE)
    right = pad(b.T, missing).contiguous()
    # Transposing takes longer than weighting, so it is done once where once is enough.
    left = right if a is b else pad(a.T, missing).contiguous()
    return float_product(left * pad(weights, missing), right)


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
            column = column - float_product(root[:last, last:], root[first:last, last:])
        corner, info = torch.linalg.cholesky_ex(column[first:].double().flip(0, 1))
        if bool(info):
            return None
        corner = corner.flip(0, 1)
        root[first:last, first:last] = corner
        if first:
            eye = torch.eye(last - first, dtype=corner.dtype, device=corner.device)
            inverse = torch.linalg.solve_triangular(corner, eye, upper=True).float()
            root[:first, first:last] = float_product(column[:first], inverse)
    return root
