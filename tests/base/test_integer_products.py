"""Products in 16-bit integers against float64, to what rounding to them may cost at most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import integer_products, linalg, native
from bitsmoe_plugin.base.integer_products import multiplied, packed_columns, packed_rows

HIGHEST, STRETCH = 4095, 128

pytestmark = pytest.mark.skipif(
    not integer_products.available(torch.device("cpu")), reason="AVX-512 VNNI and the compiled library"
)


def steps(a: Tensor) -> Tensor:
    """The most by which rounding changes each value of ``[m, n]``, a little more for float32."""
    parts = [part.abs().amax(1, keepdim=True).expand_as(part) for part in a.split(STRETCH, 1)]
    return torch.cat(parts, 1) * (0.5001 / HIGHEST) if parts else a


def close(got: Tensor, a: Tensor, b: Tensor) -> None:
    """Within what rounding of each value of two float64 matrices can add up to, and that of float32 sums."""
    off_a, off_b = steps(a), steps(b)
    bound = off_a @ b.abs().T + a.abs() @ off_b.T + off_a @ off_b.T + 1e-6 * (a.abs() @ b.abs().T)
    assert got.dtype == torch.float32
    assert got.shape == bound.shape
    assert bool(((got.double() - a @ b.T).abs() <= bound).all())


def matrix(kind: str, m: int, n: int) -> Tensor:
    values = torch.randn(m, n)
    if kind == "outliers":
        values[:, :: max(1, n // 3)] *= 1000
    if kind == "sizes":
        values *= torch.logspace(-12, 12, m)[:, None]
    if kind == "largest":  # sums of integers are as large as they get
        values = values.abs().sign()
    if kind == "zeros":
        values[m // 2 :] = 0
        values[:, n // 2 :] = 0
    return values


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "sizes", "largest", "zeros"])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (48, 49, 128), (97, 20, 129), (130, 96, 700), (0, 4, 5)]
)
def test_products_agree_with_float64(kind: str, m: int, k: int, n: int) -> None:
    a, b = matrix(kind, m, n), matrix(kind, k, n)
    close(multiplied(packed_rows(a), packed_rows(b)), a.double(), b.double())
    close(multiplied(packed_columns(a.T.contiguous()), packed_rows(b)), a.double(), b.double())


def test_rows_of_views_of_some_and_in_bfloat16() -> None:
    """Guards strides, and the index of what is gathered."""
    a, index = torch.randn(60, 300), torch.randint(60, (77,))
    for source in (a, a.bfloat16(), a.half(), a[::2], a[:, 50:], a.bfloat16()[:, ::3]):
        chosen = index % len(source)
        exact = source.double()[chosen]
        close(multiplied(packed_rows(source, chosen), packed_rows(source, chosen)), exact, exact)
        close(
            multiplied(packed_columns(source, index=chosen), packed_columns(source, index=chosen)),
            exact.T,
            exact.T,
        )


def test_weights_of_columns() -> None:
    """Second moments with weights of very different size."""
    a, weights = torch.randn(500, 70), torch.logspace(-12, 3, 500)
    weights[::7] = 0
    moment = linalg.second_moment(a, weights)
    exact = (a.double() * weights.double().sqrt()[:, None]).T
    close(moment, exact, exact)
    assert torch.equal(moment, moment.T)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """And nothing else is touched: statistics are checked for NaN, which must not become a number."""
    a, b = torch.randn(60, 300), torch.randn(50, 300)
    a[5, 7] = bad
    for left in (packed_rows(a), packed_columns(a.T.contiguous())):
        result = multiplied(left, packed_rows(b))
        assert bool(result[5].isnan().all())
        assert bool(result[torch.arange(60) != 5].isfinite().all())


def test_no_result_depends_on_the_threads() -> None:
    a = packed_rows(torch.randn(300, 1000))
    found = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(multiplied(a, a, symmetric=True))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found)
    assert torch.equal(found[0], found[0].T)


def test_an_index_that_is_out_of_range_is_not_read() -> None:
    for index in (torch.tensor([0, 5]), torch.tensor([-1])):
        with pytest.raises(AssertionError):
            packed_rows(torch.randn(5, 5), index)


def test_linalg_multiplies_integers_where_there_are_some() -> None:
    """And float32 elsewhere: guards a choice that is never taken."""
    a, b = torch.randn(100, 300), torch.randn(70, 300)
    close(linalg.product(a, b), a.double(), b.double())
    packed = linalg.rows(a)
    assert isinstance(packed, integer_products.Stripes)
    assert torch.equal(linalg.product(packed, b), linalg.product(a, b))
    assert not torch.equal(linalg.product(a, b), linalg.float_product(a, b))
    try:
        native.select("avx2")
        assert isinstance(linalg.rows(a), Tensor)
        assert torch.equal(linalg.product(a, b), linalg.float_product(a, b))
    finally:
        native.select(None)
