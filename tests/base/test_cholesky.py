"""Blocked upper roots in float32 against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import linalg
from bitsmoe_plugin.base.linalg import upper_root

BLOCKS = (1, 3, 256, 257, 600)


def moment(n: int, tokens: int, spread: float = 0.0, damping: float = 0.01) -> Tensor:
    """Second moment of coordinates that differ in size by 10**spread, damped like statistics are."""
    scale = torch.logspace(-spread / 2, spread / 2, n)[torch.randperm(n)]
    x = (torch.randn(tokens, n) @ torch.randn(n, n)) / n**0.5 * scale
    matrix = x.T @ x / tokens
    return matrix + damping * matrix.diagonal().mean() * torch.eye(n)


@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize("n", BLOCKS)
def test_factor_agrees_with_float64(n: int, spread: float) -> None:
    """Rounding errors of 2**-24 in sums of n terms, a hundredfold for the damped matrix's condition."""
    matrix = moment(n, 2 * n + 8, spread)
    root, wanted = upper_root(matrix), torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    assert torch.equal(root, root.triu())
    assert float((root - wanted).norm() / wanted.norm()) < 100 * n**0.5 * 2.0**-24
    torch.testing.assert_close(root @ root.T, matrix, rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))


def test_fewer_tokens_than_coordinates() -> None:
    """Damping alone makes it definite: the smallest variances are the damping's."""
    matrix = moment(600, 50)
    wanted = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1).diagonal()
    torch.testing.assert_close(upper_root(matrix).diagonal().double(), wanted, rtol=1e-3, atol=0)


def test_float64_takes_over(monkeypatch) -> None:
    """What is not positive definite in float32 is tried in float64, and refused if it is not there either."""
    matrix = moment(300, 400)
    assert linalg._blocked(-matrix) is None
    with pytest.raises(torch.linalg.LinAlgError):
        upper_root(-matrix)
    wanted = upper_root(matrix)
    monkeypatch.setattr(linalg, "_blocked", lambda _: None)
    torch.testing.assert_close(upper_root(matrix), wanted)
