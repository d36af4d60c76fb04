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
