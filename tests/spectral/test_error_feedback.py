"""Variances that feedback leaves, learnt from few tokens."""

from __future__ import annotations

import pytest
import torch

from bitsmoe_plugin.spectral.error_feedback import Feedback, on_other_tokens


@pytest.mark.parametrize("tokens", [80, 160, 640])
def test_variances_from_few_tokens_are_right_on_average(tokens: int) -> None:
    """Guards the plan against taking for explained what is so by chance. Wishart: a Schur complement of m
    coordinates has (N - m) / N of its mean; the mean over 40 coordinates and 50 draws is good to 1 %."""
    n = 40
    mixing = torch.randn(n, n) / n**0.5 + torch.eye(n)
    exact = Feedback.of((mixing @ mixing.T)[None], 1e-6).variance[0]
    ratios, plain = [], []
    for _ in range(50):
        x = torch.randn(tokens, n) @ mixing.T
        found = Feedback.of((x.T @ x / tokens)[None], 1e-6).variance[0]
        plain.append((found / exact).mean())
        ratios.append((on_other_tokens(found, tokens) / exact).mean())
    assert float(torch.stack(ratios).mean()) == pytest.approx(1, abs=0.02)
    assert float(torch.stack(plain).mean()) == pytest.approx(1 - (n - 1) / 2 / tokens, abs=0.02)


def test_next_to_no_tokens_raise_variances_by_a_bounded_factor() -> None:
    raised = on_other_tokens(torch.ones(64), 0)
    assert bool(torch.isfinite(raised).all())
    assert float(raised[-1]) == 1
    assert float(raised.max()) < 4
