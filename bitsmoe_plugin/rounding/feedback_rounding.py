"""Rounding of factors with error feedback (GPTQ, arXiv 2210.17323, applied to spectral factors).

Gate and up rows are visited along the rank: the error of a row is compensated in the rows after
it through the covariance of z. Down rows are visited along the neurons, through E[h h^T].
All functions are batched over experts; widths differ from row to row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.integer_products import STRETCH, Stripes, available, packed_columns
from bitsmoe_plugin.base.linalg import columns, product, rows
from bitsmoe_plugin.base.scratch import Scratch
from bitsmoe_plugin.codec import coupled_blocks, row_codec, uniform
from bitsmoe_plugin.codec.backends import RankRows, RoundingBackend, backend_for
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.scale_grid import ScaleGrid
from bitsmoe_plugin.spectral.error_feedback import Feedback

_LAZY = 32
"""Rows between which errors are passed on at once; rows further on get theirs in one product,"""
_FAR = STRETCH
"""and rows further on than these theirs in one larger, more efficient product."""


@dataclass(frozen=True)
class RoundedRows:
    """Rounded rows of one or more factors.

    Attributes:
        codes: ``[..., experts, rank, padded(I)]`` int32, see ``row_codec``.
        scale_codes: ``[..., experts, rank]`` uint8.
        values: ``[..., experts, rank, I]`` float32, what the codes stand for.
        errors: ``[..., experts, rank]`` float32, d^T C d of each row after feedback, so that their
            sum is the first-order error of the factor.
    """

    codes: Tensor
    scale_codes: Tensor
    values: Tensor
    errors: Tensor


def stacked(rows: RoundedRows) -> RoundedRows:
    """With a new first axis of length 1."""
    return RoundedRows(*(tensor[None] for tensor in _tensors(rows)))


def _tensors(rows: RoundedRows) -> tuple[Tensor, ...]:
    return rows.codes, rows.scale_codes, rows.values, rows.errors


def _passed_on(rows: RankRows, begin: int, end: int, first: int, last: int) -> Tensor:
    """What rows ``first`` to ``last`` make up for of rows ``begin`` to ``end``, ``[2, e, rows, I]``."""
    assert rows.unit is not None
    return rows.unit[:, :, begin:end, first:last].transpose(-1, -2) @ rows.work[:, :, begin:end]


class _Far:
    """What whole blocks of ``_FAR`` rows before pass on, most of the work; in integers where the CPU has
    them, which errors become once."""

    def __init__(self, rows: RankRows) -> None:
        self._rows = rows
        factors, experts, rank, size = rows.work.shape
        self._packed = [
            [Stripes.empty(size, rank) for _ in range(experts if available(rows.work.device) else 0)]
            for _ in range(factors)
        ]

    def passed_on(self, first: int, last: int) -> Tensor:
        """``_passed_on`` of all rows before ``first``."""
        rows = self._rows
        factors, experts, _, size = rows.work.shape
        if not self._packed[0] or first == 0:
            return _passed_on(rows, 0, first, first, last)
        assert rows.unit is not None
        result = torch.empty(factors, experts, last - first, size, device=rows.work.device)
        for expert in range(experts):
            shares = [columns(unit[:first, first:last]) for unit in rows.unit[:, expert]]
            for factor in range(factors):
                share = shares[min(factor, len(shares) - 1)]
                errors = self._errors(factor, expert, first)
                product(share, errors, out=result[factor, expert])
        return result

    def _errors(self, factor: int, expert: int, first: int) -> Stripes:
        """Columns of the errors of all rows before ``first``, of which a block is new."""
        packed, new = self._packed[factor][expert], slice(first - _FAR, first)
        packed_columns(self._rows.work[factor, expert, new], out=packed.part(new.start, new.stop))
        return packed.part(0, first)


def _round_in_turn(rows: RankRows, round_rank: Callable[..., None], grid: str) -> None:
    """All rows, each towards what is left to make up for."""
    rank, before = rows.work.shape[2], _Far(rows)
    for far in range(0, rank, _FAR):
        targets = before.passed_on(far, min(far + _FAR, rank))
        targets += rows.work[:, :, far : far + _FAR]
        for first in range(far, min(far + _FAR, rank), _LAZY):
            last = min(first + _LAZY, rank)
            target = _passed_on(rows, far, first, first, last)
            target += targets[:, :, first - far : last - far]
            round_rank(rows, first, last, target, grid)


def round_along_rank(
    factors: Tensor,
    bits: Tensor,
    feedback: Feedback,
    neuron_weights: Tensor,
    scale_grid: ScaleGrid,
    scales: Tensor,
    grid: str,
    in_place: bool = False,
    backend: RoundingBackend | None = None,
    scratch: Scratch | None = None,
) -> RoundedRows:
    """Round gate and up factors, row after row, each row making up for the errors of the rows before it.

    Args:
        factors: ``[factors, experts, rank, I]`` float32: gate and up.
        bits: ``[factors, experts, rank]`` int64.
        feedback: ``[1 or factors, experts]`` of rank ``rank``: for all factors, or for each.
        neuron_weights: ``[factors, experts, I]``.
        scale_grid: ``[factors, rank]``.
        scales: ``[factors, experts, rank]``, free scales to start from.
        grid: see ``row_codec``.
        in_place: ``factors``, contiguous, may be overwritten.
        backend: default: the one for ``factors``.
        scratch: where codes and values are returned, as "codes" and "values".

    Returns:
        see ``RoundedRows``.
    """
    rank, size = factors.shape[-2:]
    scratch, device = scratch or Scratch(), factors.device
    padded = *bits.shape, row_codec.padded(size)
    rows = RankRows(
        work=factors if in_place else factors.clone(memory_format=torch.contiguous_format),
        bits=bits.to(torch.uint8).contiguous(),
        unit=None if feedback.unit is None else feedback.unit.contiguous(),
        weights=neuron_weights.contiguous(),
        start=scale_grid.encode(scales).contiguous(),
        low=scale_grid.low.float().contiguous(),
        step=scale_grid.step.float().contiguous(),
        codes=scratch.empty("codes", factors, padded, torch.int32),
        scale_codes=torch.empty(bits.shape, dtype=torch.uint8, device=device),
        values=scratch.empty("values", factors, factors.shape),
        errors=torch.empty(bits.shape, device=device),
    )
    round_rank = (backend or backend_for(factors)).round_rank
    if feedback.unit is None:  # a row is its own target, and what is left of it nobody reads
        round_rank(rows, 0, rank, rows.work, grid)
    else:
        _round_in_turn(rows, round_rank, grid)
    rows.errors.mul_(feedback.variance)
    return RoundedRows(rows.codes, rows.scale_codes, rows.values, rows.errors)


def _round_columns(target: Tensor, scale: Tensor, bits: Tensor, unit: Tensor) -> Tensor:
    """Codes of one block on the uniform grid, each column's error passed on to the next ones."""
    work = target.clone()
    codes = torch.zeros(*bits.shape, BLOCK, dtype=torch.int32, device=bits.device)
    scale, bits = scale[..., None], bits[..., None]
    for i in range(work.shape[-1]):
        code = uniform.encode(work[:, :, i : i + 1], scale, bits)
        codes[:, :, i] = code[..., 0].to(torch.int32)
        error = target[:, :, i : i + 1] - uniform.decode(code, scale, bits)
        work[:, :, i + 1 :] += error * unit[:, None, i, i + 1 :]
    return codes


def _blocks(errors: Tensor, unit: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of 32 neurons in turn, and what each has to make up for, ``[e, rank, neurons]``, of the errors
    that are there when it is its turn."""
    size = errors.shape[-1]
    for far in range(0, size, _FAR):
        end = min(far + _FAR, size)
        of_far = _from_far(errors, unit, far, end)
        for first in range(far, end, BLOCK):
            own, near = slice(first, min(first + BLOCK, end)), slice(far, first)
            of_near = errors[:, :, near] @ unit[:, near, own]
            yield own, of_far[..., first - far : own.stop - far] + of_near


def _from_far(errors: Tensor, unit: Tensor, first: int, last: int) -> Tensor:
    """What neurons ``first`` to ``last`` make up for of all before, ``[e, rank, neurons]``; in integers where
    the CPU has them."""
    if not available(errors.device) or first == 0:
        return errors[:, :, :first] @ unit[:, :first, first:last]
    result = torch.empty(*errors.shape[:2], last - first, device=errors.device)
    for own, shares, found in zip(errors, unit, result, strict=True):
        product(rows(own[:, :first]), columns(shares[:first, first:last]), out=found)
    return result


def round_along_neurons(
    factor: Tensor, bits: Tensor, feedback: Feedback, scale_grid: ScaleGrid, scales: Tensor, grid: str
) -> RoundedRows:
    """Round down factors, block after block of 32 neurons, each row under a scale fixed in advance.

    Args as for ``round_along_rank`` without the first axis, but feedback is ``[experts]`` of neurons, and
    there are no ``neuron_weights``.
    """
    if feedback.unit is None:  # then it is all the same which way one goes
        rank = Feedback(None, torch.ones(1, *factor.shape[:-1], device=factor.device))
        grid_of_one = ScaleGrid(scale_grid.low[None], scale_grid.step[None])
        one = factor[None], bits[None], rank, feedback.variance[None], grid_of_one, scales[None]
        rows = round_along_rank(*one, grid)
        return RoundedRows(*(tensor[0] for tensor in _tensors(rows)))
    size = factor.shape[-1]
    weights = feedback.variance[:, None]
    low, step = scale_grid.low.float(), scale_grid.step.float()
    start = scale_grid.encode(scales)
    scale_codes, _ = backend_for(factor).choose_scales(factor, weights, bits, start, low, step)
    scale = torch.exp2(low + scale_codes * step)  # as readers compute it, to the last bit
    codes = torch.empty(*bits.shape, row_codec.padded(size), dtype=torch.int32, device=factor.device)
    values, errors = torch.empty_like(factor), torch.empty_like(factor)  # errors: factor minus value
    remaining = torch.zeros(bits.shape, device=factor.device)
    for own, passed_on in _blocks(errors, feedback.unit):
        unit, variance = feedback.unit[:, own, own], feedback.variance[:, own]
        target = factor[:, :, own] + passed_on @ torch.linalg.inv(unit)
        if grid == "uniform":
            code = _round_columns(target, scale, bits, unit)
            value = row_codec.decode(code, scale, bits, target.shape[-1], grid)
        else:
            code, value = coupled_blocks.rounded(target, scale, unit, variance, bits, grid)
        codes[:, :, own.start : own.start + BLOCK], values[:, :, own] = code, value
        errors[:, :, own] = factor[:, :, own] - value
        # |(target - value) root|^2 is what the block costs once later blocks have made up for it.
        remaining += ((target - value) @ (unit * variance[:, None].sqrt())).square().sum(-1)
    return RoundedRows(codes, scale_codes, values, remaining)
