"""Trellis codes of blocks in which errors are passed on: never worse than without, alike in C and torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec import coupled_blocks, row_codec, trellis
from bitsmoe_plugin.codec.backends import CoupledBlocks
from bitsmoe_plugin.codec.backends.native import COMPILED
from bitsmoe_plugin.codec.backends.reference import REFERENCE, ReferenceBackend
from bitsmoe_plugin.codec.trellis import coupled_search


def _blocks(bits: int, count: int = 120, correlated: bool = True, used: int = 32) -> CoupledBlocks:
    """Blocks of three owners, coded as if errors stayed where they are; filled up from ``used`` on."""
    generator = torch.Generator().manual_seed(bits)
    random = torch.randn(3, 32, 40, generator=generator) + 1.5 * torch.randn(3, 1, 40, generator=generator)
    moments = random @ random.mT / 40 + 0.02 * torch.eye(32)
    flipped = torch.linalg.cholesky(moments.flip(-1, -2)).flip(-1, -2)
    scale = flipped.diagonal(dim1=-2, dim2=-1)
    unit = flipped / scale[:, None] if correlated else torch.eye(32).expand(3, -1, -1).contiguous()
    variance = scale.square().clone()
    unit[:, used:], unit[:, :, used:], variance[:, used:] = 0, 0, 0
    rows = torch.randn(count, 32, generator=generator)
    rows[:, used:] = 0
    owner = torch.randint(3, (count,), generator=generator)
    alone = (unit.square() @ variance[..., None])[owner, :, 0]
    codes = REFERENCE.trellis_codes(trellis.table(bits), rows, alone, bits)
    return CoupledBlocks(rows, owner, unit, variance, codes)


def _costs(blocks: CoupledBlocks, codes: Tensor, bits: int) -> Tensor:
    errors = blocks.rows - trellis.decode(codes, bits)
    passed = (errors[:, None] @ blocks.unit[blocks.owner])[:, 0]
    return (passed.square() * blocks.variance[blocks.owner]).sum(-1)


@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_never_costs_more_and_pays_where_values_are_correlated(bits: int) -> None:
    """Guards against a path that carries another path's errors: its cost would not be what it seems."""
    blocks = _blocks(bits)
    codes = REFERENCE.coupled_codes(trellis.table(bits), blocks, bits)
    before, after = _costs(blocks, blocks.codes, bits), _costs(blocks, codes, bits)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.8 * float(before.sum())


@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_without_correlation_it_is_the_plain_search(bits: int) -> None:
    """Guards against paths that pass on what there is not, or that forget the ring's seam."""
    blocks = _blocks(bits, correlated=False)
    codes = REFERENCE.coupled_codes(trellis.table(bits), blocks, bits)
    assert torch.equal(coupled_search.seams(codes, bits), coupled_search.seams(blocks.codes, bits))
    torch.testing.assert_close(
        _costs(blocks, codes, bits), _costs(blocks, blocks.codes, bits), rtol=1e-4, atol=1e-6
    )


@pytest.mark.skipif(native.library() is None, reason="no compiled library")
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_compiled_search_finds_what_the_reference_finds(bits: int, instructions: str) -> None:
    """Sums differ in their last bits, so ties may be broken otherwise: costs are alike, codes nearly all.
    With AVX-512 paths carry 16-bit integers: one that is worse by so little may be taken, and lead
    elsewhere."""
    if native.select(instructions) is None:
        pytest.skip(f"this machine has no {instructions}")
    try:
        for blocks in (_blocks(bits), _blocks(bits, count=70, used=13)):
            wanted = REFERENCE.coupled_codes(trellis.table(bits), blocks, bits)
            found = COMPILED.coupled_codes(trellis.table(bits), blocks, bits)
            used = blocks.variance[0] > 0
            same = float((found == wanted)[:, used].float().mean())
            costs = _costs(blocks, found, bits), _costs(blocks, wanted, bits)
            if instructions == "avx512":
                assert same > 0.96
                torch.testing.assert_close(costs[0].sum(), costs[1].sum(), rtol=0.01, atol=0)
            else:
                assert same > 0.99
                torch.testing.assert_close(*costs, rtol=2e-4, atol=1e-6)
    finally:
        native.select(None)


def _outlier(blocks: CoupledBlocks) -> None:
    blocks.rows[::3, 5] *= 100


def _all_far_away(blocks: CoupledBlocks) -> None:
    blocks.rows.mul_(1e4)


def _passing_on(share: float) -> Callable[[CoupledBlocks], None]:
    def change(blocks: CoupledBlocks) -> None:
        blocks.unit.sub_(torch.eye(32)).mul_(share).add_(torch.eye(32))

    return change


@pytest.mark.skipif(native.library() is None, reason="no compiled library")
@pytest.mark.parametrize(
    "change",
    [_outlier, _all_far_away, _passing_on(8.0), _passing_on(1e-3), _passing_on(0.0)],
    ids=["outlier", "far away", "much is passed on", "little is passed on", "nothing is passed on"],
)
@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_steps_of_integers_fit_what_a_block_holds(bits: int, change: Callable[[CoupledBlocks], None]) -> None:
    """Guards against integers that overflow, or that tell nothing apart: a third of blocks costs more."""
    blocks = _blocks(bits, count=600)
    change(blocks)
    found = COMPILED.coupled_codes(trellis.table(bits), blocks, bits)
    before = _costs(blocks, blocks.codes, bits)
    wanted = _costs(blocks, REFERENCE.coupled_codes(trellis.table(bits), blocks, bits), bits)
    costs = _costs(blocks, found, bits)
    assert bool((costs <= before * (1 + 1e-5)).all())
    torch.testing.assert_close(costs.sum(), wanted.sum(), rtol=0.02, atol=0)
    assert float((costs <= wanted * 1.02).float().mean()) > 0.9


@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("grid", row_codec.GRIDS)
def test_rows_of_all_widths_and_short_blocks(size: int, grid: str) -> None:
    """Rows of width 0 and of the uniform grid are coded as before; values are those that readers decode."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.tensor([[0, 1, 2, 3, 4, 5, 8]]).expand(2, -1)
    target = torch.randn(2, 7, size, generator=generator)
    scales = torch.where(bits > 0, 0.5 + torch.rand(2, 7, generator=generator), 0.0)
    unit = torch.eye(size) + torch.randn(2, size, size, generator=generator).triu(1) * 0.3
    variance = torch.rand(2, size, generator=generator) + 0.1
    codes, values = coupled_blocks.rounded(target, scales, unit, variance, bits, grid)
    assert codes.shape == (2, 7, 32)
    assert torch.equal(values, row_codec.decode(codes, scales, bits, size, grid))
    alone = (unit.square() @ variance[..., None]).squeeze(-1)[:, None]
    plain, plain_values = row_codec.rounded(target, scales, alone, bits, grid)
    kept = torch.tensor([not row_codec.uses_trellis(int(b), grid) for b in bits[0]])
    assert torch.equal(codes[:, kept], plain[:, kept])
    cost, before = (
        (((target - v) @ unit).square() * variance[:, None]).sum(-1) for v in (values, plain_values)
    )
    assert bool((cost <= before * (1 + 1e-5)).all())


@pytest.mark.skipif(native.library() is None, reason="no compiled library")
@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("grid", row_codec.GRIDS)
def test_compiled_rows_of_all_widths_are_those_of_its_searches(size: int, grid: str) -> None:
    """More rows than are taken together, and than an expert has. Guards against a row's scale, or another
    expert's unit, at a block that stands elsewhere in its batch."""
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(0, 9, (3, 50), generator=generator)
    rows = torch.randn(3, 50, size, generator=generator)
    scales = torch.where(bits > 0, 0.5 + torch.rand(3, 50, generator=generator), 0.0)
    unit = torch.eye(32) + torch.randn(3, 32, 32, generator=generator).triu(1) * 0.3
    variance = torch.rand(3, 32, generator=generator) + 0.1
    unit[:, size:], unit[:, :, size:], variance[:, size:] = 0, 0, 0
    weights = (unit.square() @ variance[..., None])[:, None, :size, 0]
    given = rows, scales, weights, unit, variance, bits, grid
    wanted, wanted_values = ReferenceBackend.rounded_coupled(COMPILED, *given)
    codes, values = COMPILED.rounded_coupled(*given)
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(values, wanted_values, rtol=1e-6, atol=1e-6)
