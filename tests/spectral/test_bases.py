"""Shared bases and factors against linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import linalg
from bitsmoe_plugin.codec.basis import QuantizedBasis, quantize_basis
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.spectral.bases import (
    BasisInverses,
    SharedBases,
    down_factors,
    input_basis,
    input_factors,
    output_basis,
    shrink,
)

N = 32

pytestmark = pytest.mark.usefixtures("float_products")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def positive_definite(seed: int, decades: float = 2.0) -> Tensor:
    """Random ``[N, N]`` with eigenvalues over some decades."""
    vectors = torch.linalg.qr(normal(N, N, seed=seed))[0]
    return vectors * torch.logspace(0, -decades, N, dtype=torch.double) @ vectors.T


def off_diagonal(matrix: Tensor) -> float:
    """Largest entry off the diagonal, relative to the geometric mean of its two diagonal entries."""
    scale = matrix.diagonal().sqrt()
    return float((matrix / scale / scale[:, None]).fill_diagonal_(0).abs().max())


@pytest.fixture
def weights() -> ExpertWeights:
    return ExpertWeights(
        normal(3, 24, N).float(), normal(3, 24, N, seed=1).float(), normal(3, N, 24, seed=2).float()
    )


def all_factors(weights: ExpertWeights, bases: SharedBases) -> Tensor:
    """``[3, E, r, I]``: gate, up, down."""
    inverses, everyone = BasisInverses.of(bases), slice(None)
    given = input_factors(weights, inverses, everyone)
    return torch.cat([given, down_factors(weights, inverses, everyone)[None]])


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_factors_reproduce_the_weights_in_the_quantized_bases(weights: ExpertWeights, bits: int) -> None:
    """The bases' rounding error must not reach the weights, however coarse the bases.

    Products of n terms in float32 are good to n * 2**-24 of the norms; going through the basis
    and back multiplies norms by at most its condition number.
    """
    given = input_basis(positive_definite(3), positive_definite(4))
    bases = SharedBases(
        quantize_basis(given, bits, 16),
        quantize_basis(output_basis(positive_definite(5)), bits, 16),
    )
    gate, up, down = all_factors(weights, bases).double()
    read, write = (b.dequantize().double() for b in (bases.input_basis, bases.output_basis))
    for rebuilt, exact, basis in (
        (gate.transpose(1, 2) @ read, weights.gate, read),
        (up.transpose(1, 2) @ read, weights.up, read),
        (write @ down, weights.down, write),
    ):
        condition = float(torch.linalg.cond(basis))
        assert condition < 1e4
        assert float((rebuilt - exact).norm() / exact.double().norm()) < N * 2**-24 * condition


def test_two_input_bases_reproduce_gate_and_up_each(weights: ExpertWeights) -> None:
    """Gate's basis stands above up's; the tolerance is that of one basis."""
    given = [input_basis(positive_definite(seed), positive_definite(4)) for seed in (3, 7)]
    out = quantize_basis(output_basis(positive_definite(5)), 4, 16)
    bases = SharedBases(quantize_basis(torch.cat(given), 4, 16), out)
    read = bases.input_bases().double()
    assert read.shape == (2, N, N)
    alone = quantize_basis(given[1], 4, 16).dequantize()
    assert torch.equal(read[1].float(), alone), "a row's groups depend on other rows"
    factors = all_factors(weights, bases).double()
    for part, exact in enumerate((weights.gate, weights.up)):
        condition = float(torch.linalg.cond(read[part]))
        error = (factors[part].transpose(1, 2) @ read[part] - exact).norm() / exact.double().norm()
        assert float(error) < N * 2**-24 * condition
    assert float((factors[1].transpose(1, 2) @ read[0] - weights.up).norm() / weights.up.norm()) > 0.1


def test_one_input_basis_serves_gate_and_up() -> None:
    """``input_bases()[0]`` is gate's, ``[-1]`` up's, so that both readings are the same basis."""
    basis = quantize_basis(normal(N, N), 8, 16)
    bases = SharedBases(basis, basis).input_bases()
    assert bases.shape == (1, N, N)
    assert torch.equal(bases[0], basis.dequantize())


def test_input_basis_makes_inputs_and_factors_uncorrelated() -> None:
    """Whitening: in the basis B both B C B^T (what z carries) and B^-T G B^-1 (the factors' energy)
    are diagonal, and their products add up to the whole output energy tr(C G), by rising share."""
    gram, moment = positive_definite(0), positive_definite(1)
    basis = input_basis(gram, moment)
    inverse = torch.linalg.inv(basis)
    carried, factor_energy = basis @ moment @ basis.T, inverse.T @ gram @ inverse
    assert off_diagonal(carried) < 1e-8
    assert off_diagonal(factor_energy) < 1e-8
    energy = carried.diagonal() * factor_energy.diagonal()
    torch.testing.assert_close(energy.sum(), (moment @ gram).trace())
    assert bool((energy.diff() > 0).all())
    torch.testing.assert_close(basis.norm(dim=-1), torch.ones(N, dtype=torch.double))


def test_factors_in_the_whitened_basis_carry_the_output_energy(weights: ExpertWeights) -> None:
    """Each row's factor energy times the variance of its z is its share of E|W x|^2: what row
    costs rest on. A float16 basis moves each variance by about 2**-10, amplified at most by the
    condition number of the metric's root, 10."""
    moment = positive_definite(1)
    stacked = torch.cat([weights.gate, weights.up]).double().flatten(0, 1)
    basis = quantize_basis(input_basis(stacked.T @ stacked, moment), 16, 16)
    factors = all_factors(weights, SharedBases(basis, basis))[:2].double()
    carried = basis.dequantize().double() @ moment @ basis.dequantize().double().T
    shares = factors.square().sum((0, 1, 3)) * carried.diagonal()
    total = (stacked @ moment @ stacked.T).trace()
    torch.testing.assert_close(shares.sum(), total, rtol=10 * 2**-10, atol=0)


def test_identity_metric_gives_the_singular_vectors() -> None:
    """Without whitening: the right singular vectors of the stacked weights, as published."""
    stacked = normal(100, N)
    basis = input_basis(stacked.T @ stacked, torch.eye(N, dtype=torch.double))
    singular = torch.linalg.svd(stacked, full_matrices=False)[2].flip(0)
    torch.testing.assert_close((basis * singular).sum(-1).abs(), torch.ones(N, dtype=torch.double))


def test_metric_of_low_rank_gives_a_finite_invertible_basis() -> None:
    """Fewer calibration tokens than dimensions must not divide by zero."""
    few = normal(3, N)
    basis = input_basis(positive_definite(0), few.T @ few)
    assert bool(torch.isfinite(torch.linalg.inv(basis)).all())


def of_rank(rank: int, seed: int, decades: float) -> Tensor:
    """As ``positive_definite``, but for the smallest eigenvalues, which are zero."""
    vectors = torch.linalg.qr(normal(N, N, seed=seed))[0]
    values = torch.logspace(0, -decades, N, dtype=torch.double) * (torch.arange(N) < rank)
    return vectors * values @ vectors.T


@pytest.mark.parametrize(
    ("gram", "moment"),
    [
        (positive_definite(0), positive_definite(1)),
        (positive_definite(0, 8.0), positive_definite(1, 3.0)),
        (positive_definite(0, 2.0), positive_definite(1, 7.0)),
        (of_rank(3, 0, 2.0), positive_definite(1)),
        (positive_definite(0), of_rank(3, 1, 2.0)),
        (1e12 * positive_definite(0), 1e-12 * positive_definite(1)),
        (1e-60 * positive_definite(0), 1e50 * positive_definite(1)),
        (0 * positive_definite(0), positive_definite(1)),
    ],
    ids=["easy", "gram 1e8", "metric 1e7", "gram rank 3", "metric rank 3", "large", "tiny", "0"],
)
def test_directions_in_float32_compact_as_in_float64(gram: Tensor, moment: Tensor, monkeypatch) -> None:
    """Of large layers eigenvectors are in float32: guards ill-conditioned, rank-deficient and badly scaled
    moments. What counts is the energy of each row, that is the diagonal of what the rows are to make
    diagonal: float32 moves it by about its precision, 2**-24, times the largest, N times at most."""
    energies = []
    for least in (10**9, 1):
        monkeypatch.setattr(linalg, "_FLOAT32_FROM", least)
        basis = input_basis(gram, moment)
        inverse = torch.linalg.inv(basis)
        assert bool(torch.isfinite(inverse).all())
        energies.append((basis @ moment @ basis.T).diagonal() * (inverse.T @ gram @ inverse).diagonal())
    exact, found = energies
    assert float((found - exact).abs().max()) <= N * 2**-24 * float(exact.max())


def test_output_basis_in_float32_is_orthonormal(monkeypatch) -> None:
    """However small some outputs are."""
    monkeypatch.setattr(linalg, "_FLOAT32_FROM", 1)
    moment = 1e-40 * positive_definite(6, 9.0)
    basis = output_basis(moment)
    assert basis.dtype == torch.double
    torch.testing.assert_close(basis.T @ basis, torch.eye(N, dtype=torch.double), rtol=0, atol=N * 2**-24)
    energy, exact = (basis.T @ moment @ basis).diagonal(), torch.linalg.eigvalsh(moment)
    assert float((energy - exact).abs().max()) <= N * 2**-24 * float(exact.max())


def test_output_basis_diagonalises_the_outputs() -> None:
    """Orthonormal, so that output error is factor error; columns by rising energy."""
    moment = positive_definite(6)
    basis = output_basis(moment)
    torch.testing.assert_close(basis.T @ basis, torch.eye(N, dtype=torch.double))
    rotated = basis.T @ moment @ basis
    assert off_diagonal(rotated) < 1e-8
    assert bool((rotated.diagonal().diff() > 0).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32])
def test_basis_error_is_at_most_that_of_the_unclipped_grid(bits: int, group_size: int) -> None:
    """Per group: the grid that reaches the largest value m errs by at most half a step,
    m / (2**bits - 1), and the chosen scale is no worse; rounding it to float16 adds 2**-11 m."""
    basis = normal(N, 64)
    error = (quantize_basis(basis, bits, group_size).dequantize() - basis).view(N, -1, group_size)
    largest = basis.view(N, -1, group_size).abs().amax(-1)
    assert bool((error.square().mean(-1).sqrt() <= largest * (1 / (2**bits - 1) + 2**-11)).all())


def test_four_bit_basis_error_is_that_of_a_gaussian() -> None:
    """Guards the grid inside the groups: below 0.01154 of the energy (Max, 1960), as every 32 values
    fit a scale of their own, and above what 4.5 bits can do for a Gaussian at all, 2**-9."""
    basis = normal(64, 256)
    error = quantize_basis(basis, 4, 32).dequantize() - basis
    assert 2**-9 < float(error.square().mean() / basis.square().mean()) < 0.01154


def test_sixteen_bit_basis_is_float16() -> None:
    """Stores float16 values and no scales; error at most 2**-11 of each value (2**-25 when tiny)."""
    basis = normal(N, N)
    stored = quantize_basis(basis, 16, 16)
    assert stored.codes.dtype == torch.float16
    assert stored.scales.numel() == 0
    assert bool(((stored.dequantize() - basis).abs() <= basis.abs() * 2**-11 + 2**-25).all())


def test_each_group_has_its_own_scale() -> None:
    """Guards against reading scales along the wrong axis: decoded by hand from codes and scales."""
    scales = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).half()
    basis = QuantizedBasis(torch.tensor([[0.0, 15.0, 7.0, 8.0]] * 2), scales, 4, 2)
    step = 0.3352
    wanted = [[-7.5, 7.5, -5.0, 5.0], [-750.0, 750.0, -500.0, 500.0]]
    torch.testing.assert_close(basis.dequantize(), step * torch.tensor(wanted))


@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])
def test_shrinking_keeps_the_trace_and_lifts_the_smallest_eigenvalue(amount: float) -> None:
    """Ledoit and Wolf: eigenvalues move towards the mean of their matrix by ``amount``."""
    batch = torch.stack([positive_definite(0), 7 * positive_definite(1)])
    shrunk = shrink(batch, amount)
    values = torch.linalg.eigvalsh(batch)
    wanted = (1 - amount) * values + amount * values.mean(-1, keepdim=True)
    torch.testing.assert_close(torch.linalg.eigvalsh(shrunk), wanted)
