"""Products of float32, where there are none of integers (``test_integer_products``), against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import linalg

BOUND = 2.0**-22
"""Relative error of sums of float32: a rounding error of 2**-24 grows with the root of their length."""


def close(got: Tensor, wanted: Tensor, length: int) -> None:
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    assert float((got.double() - wanted).norm()) <= BOUND * length**0.5 * float(wanted.norm())


pytestmark = pytest.mark.usefixtures("float_products")


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def either(request, monkeypatch) -> None:
    monkeypatch.setattr(linalg, "_has_onednn", lambda: request.param)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (64, 32, 128), (65, 3, 7), (300, 96, 1000), (0, 4, 5)])
def test_product_agrees_with_float64(either, m: int, k: int, n: int) -> None:
    """Guards the filling up with rows, and operands that are not contiguous."""
    a, b = torch.randn(m, n), torch.randn(k, n)
    close(linalg.product(a, b), a.double() @ b.double().T, n)
    close(linalg.product(a.T.contiguous().T, b.T.contiguous().T), a.double() @ b.double().T, n)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 200])
def test_weighted_products_agree_with_float64(either, n: int) -> None:
    """Weights of very different size; the zeros that fill up add nothing."""
    a, b, weights = torch.randn(n, 20), torch.randn(n, 12), torch.logspace(-6, 6, n)
    wanted = torch.einsum("nm,nk,n->mk", a.double(), b.double(), weights.double())
    close(linalg.weighted_products(a, b, weights), wanted, max(n, 1))


@pytest.mark.parametrize("m", [5, 1024, 1500])
def test_symmetric_product_agrees_with_the_whole_one(m: int) -> None:
    """Of large matrices one half is mirrored: guards its borders, sizes that no block divides included."""
    left, middle = torch.randn(m, 40), torch.randn(40, 40)
    right = left @ (middle @ middle.T)
    close(linalg.symmetric_product(right, left), right.double() @ left.double().T, 40)


def test_products_use_onednn_where_torch_has_it() -> None:
    """Guards against a silent fall back to the slower library when torch moves the operator."""
    assert linalg._has_onednn() == torch.backends.mkldnn.is_available()


def _moment(n: int, tokens: int, largest: float) -> Tensor:
    """Second moment of inputs one of whose features is as much larger than the others."""
    inputs = torch.randn(tokens, n, generator=torch.Generator().manual_seed(n)).double()
    inputs[:, 5] *= largest
    return inputs.T @ inputs / tokens


def _off_diagonals(found: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the root of the product of two diagonal entries."""
    size = exact.diagonal().sqrt()
    return float(((found - exact) / (size[:, None] * size)).abs().max())


@pytest.mark.parametrize("largest", [1.0, 1e4])
@pytest.mark.parametrize(("n", "tokens"), [(64, 200), (600, 2000), (600, 300)])
def test_moments_in_a_basis_are_exact_for_rows_of_little_energy(n: int, tokens: int, largest: float) -> None:
    """Guards against rounding that is relative to the largest eigenvalue, where massive activations make that
    a million times what most rows see; and inputs of fewer tokens than dimensions."""
    moment = _moment(n, tokens, largest)
    root = torch.linalg.cholesky(moment + 1e-3 * moment.diagonal().mean() * torch.eye(n))
    basis = torch.linalg.inv(root).float()
    basis += 0.03 * torch.randn(n, n) * basis.abs().amax(1, keepdim=True)
    exact = basis.double() @ moment @ basis.double().T
    found = linalg.projected_moment(basis, moment)
    assert found.dtype == torch.float32
    assert _off_diagonals(found, exact) < 1e-4


def test_a_moment_of_nothing_is_nothing() -> None:
    """Guards layers whose inputs are all 0."""
    assert not bool(linalg.projected_moment(torch.randn(600, 600), torch.zeros(600, 600).double()).any())


@pytest.mark.parametrize("largest", [1.0, 1e4])
def test_moments_that_rounding_left_indefinite_are_taken_as_they_are(largest: float) -> None:
    """Guards fewer tokens than dimensions, summed up in float32: there is no Cholesky root."""
    moment = _moment(600, 300, largest)
    moment = moment.float().double() - 1e-7 * moment.diagonal().amax() * torch.eye(600)
    assert int(torch.linalg.cholesky_ex(moment)[1])
    basis = torch.randn(600, 600)
    close(linalg.projected_moment(basis, moment), basis.double() @ moment @ basis.double().T, 600)


@pytest.mark.parametrize("largest", [1.0, 1e4])
@pytest.mark.parametrize("n", [64, 600])
def test_congruent_agrees_with_float64(n: int, largest: float) -> None:
    """Of rows of very different length, and of matrices far from 1."""
    weights = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(0)).double()
    matrix, a = 1e-20 * weights @ weights.T, 1e6 * torch.linalg.cholesky(_moment(n, 2 * n, largest)).T
    exact = a @ matrix @ a.T
    found = linalg.congruent(a, matrix)
    assert _off_diagonals(found, exact) < 1e-4
