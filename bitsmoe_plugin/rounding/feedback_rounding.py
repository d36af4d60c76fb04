"""Rounding of factors with error feedback (GPTQ, arXiv 2210.17323, applied to spectral factors).

Gate and up rows are visited along the rank: the error of a row is compensated in the rows after
it through the covariance of z. Down rows are visited along the neurons, through E[h h^T].
All functions are batched over experts; widths differ from row to row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bitsmoe_plugin.codec import row_codec, trellis, uniform
from bitsmoe_plugin.codec.backends import gpu, native
from bitsmoe_plugin.codec.scale_grid import ScaleGrid, nearby_codes
from bitsmoe_plugin.spectral.error_feedback import Feedback

_LAZY = 32
"""Rows between which errors are passed on at once; rows further on get theirs in one product,"""
_FAR = 128
"""and rows further on than these theirs in one larger, more efficient product."""
_GPU_VALUES = 2**26
"""Values that a GPU rounds at once where no row waits for another."""


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


@dataclass(frozen=True)
class _RankLoop:
    """Tensors of ``round_along_rank``.

    Attributes:
        work: ``[2, e, r, I]``: rows not yet rounded; of the others, row minus value.
        unit: ``[1 or 2, e, r, r]``, or None.
        start, low, step: planned scale codes ``[2, e, r]`` and scale grids ``[2, r]``.
        rows: what is being filled.
    """

    work: Tensor
    bits: Tensor
    unit: Tensor | None
    weights: Tensor
    start: Tensor
    low: Tensor
    step: Tensor
    rows: RoundedRows

    def passed_on(self, begin: int, end: int, first: int, last: int) -> Tensor:
        """What rows ``first`` to ``last`` make up for of rows ``begin`` to ``end``, ``[2, e, rows, I]``."""
        assert self.unit is not None
        return self.unit[:, :, begin:end, first:last].transpose(-1, -2) @ self.work[:, :, begin:end]

    def round(self, first: int, last: int, target: Tensor, grid: str) -> None:
        """Round rows ``first`` to ``last`` towards target ``[2, e, last - first, I]``."""
        size = target.shape[-1]
        for k in range(first, last):
            row, width = target[:, :, k - first], self.bits[:, :, k].long()
            low, step = self.low[:, None, k], self.step[:, None, k]
            code = nearby_codes(row, self.weights, width, self.start[:, :, k], low, step)
            scale = torch.exp2(low + code * step)
            coded = row_codec.encode(row, scale, self.weights, width, grid)
            value = row_codec.decode(coded, scale, width, size, grid)
            left = (row - value).square() * self.weights
            self.rows.codes[:, :, k], self.rows.scale_codes[:, :, k] = coded, code
            self.rows.values[:, :, k], self.rows.errors[:, :, k] = value, left.sum(-1)
            self.work[:, :, k] -= value
            if self.unit is None:
                continue
            share = self.unit[:, :, k, k + 1 : last, None]
            target[:, :, k + 1 - first :] += share * self.work[:, :, k, None]

    def round_on_gpu(self, first: int, last: int, target: Tensor, grid: str) -> None:
        """The same in a few launches per row, or for many rows at once where errors are not passed on."""
        together = 1 if self.unit is not None else max(1, _GPU_VALUES // target[:, :, 0].numel())
        weights = self.weights[:, :, None]
        for k in range(first, last, together):
            some = slice(k, min(k + together, last))
            rows, width = target[:, :, some.start - first : some.stop - first], self.bits[:, :, some]
            low, step = self.low[:, None, some], self.step[:, None, some]
            code, scale = gpu.choose_scales(rows, weights, width, self.start[:, :, some], low, step)
            coded, value = gpu.rounded(rows, scale, weights, width, grid)
            left = (rows - value).square_().mul_(weights)
            self.rows.codes[:, :, some], self.rows.scale_codes[:, :, some] = coded, code
            self.rows.values[:, :, some], self.rows.errors[:, :, some] = value, left.sum(-1)
            self.work[:, :, some] -= value
            if self.unit is not None:
                share = self.unit[:, :, k, k + 1 : last, None]
                target[:, :, k + 1 - first :].addcmul_(share, self.work[:, :, some])

    def round_fast(self, first: int, last: int, target: Tensor, grid: str) -> None:
        """The same, compiled."""
        tables = {bits: trellis.table(bits) for bits in trellis.WIDTHS if row_codec.uses_trellis(bits, grid)}
        parts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        rows = {field.name: getattr(self.rows, field.name) for field in fields(self.rows)}
        native.round_rank(first, last, target=target, steps=uniform.STEP, tables=tables, **parts, **rows)


def round_along_rank(
    factors: Tensor,
    bits: Tensor,
    feedback: Feedback,
    neuron_weights: Tensor,
    scale_grid: ScaleGrid,
    scales: Tensor,
    grid: str,
    fast: bool = True,
    in_place: bool = False,
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
        fast: use compiled code, if there is any for the device.
        in_place: ``factors``, contiguous, may be overwritten.

    Returns:
        see ``RoundedRows``.
    """
    rank, size = factors.shape[-2:]
    rows = RoundedRows(
        torch.empty(*bits.shape, row_codec.padded(size), dtype=torch.int32),
        torch.empty(bits.shape, dtype=torch.uint8),
        torch.empty(factors.shape),
        torch.empty(bits.shape),
    )
    loop = _RankLoop(
        factors if in_place else factors.clone(memory_format=torch.contiguous_format),
        bits.to(torch.uint8).contiguous(),
        None if feedback.unit is None else feedback.unit.contiguous(),
        neuron_weights.contiguous(),
        scale_grid.encode(scales).contiguous(),
        scale_grid.low.float().contiguous(),
        scale_grid.step.float().contiguous(),
        rows,
    )
    round_part = loop.round
    if fast and native.available(factors):
        round_part = loop.round_fast
    elif fast and gpu.available(factors):
        round_part = loop.round_on_gpu
    if feedback.unit is None:  # a row is its own target, and what is left of it nobody reads
        round_part(0, rank, loop.work, grid)
    for far in range(0, rank if feedback.unit is not None else 0, _FAR):
        targets = loop.passed_on(0, far, far, min(far + _FAR, rank))
        targets += loop.work[:, :, far : far + _FAR]
        for first in range(far, min(far + _FAR, rank), _LAZY):
            last = min(first + _LAZY, rank)
            target = loop.passed_on(far, first, first, last)
            target += targets[:, :, first - far : last - far]
            round_part(first, last, target, grid)
    rows.errors.mul_(feedback.variance)
    return rows


def _round_columns(target: Tensor, scale: Tensor, bits: Tensor, unit: Tensor) -> Tensor:
    """Codes of one block on the uniform grid, each column's error passed on to the next ones.

    A trellis chooses the codes of a block together, so it cannot pass errors on inside.
    """
    work = target.clone()
    codes = torch.zeros(*bits.shape, row_codec.BLOCK, dtype=torch.int32)
    scale, bits = scale[..., None], bits[..., None]
    for i in range(work.shape[-1]):
        code = uniform.encode(work[:, :, i : i + 1], scale, bits)
        codes[:, :, i] = code[..., 0].to(torch.int32)
        error = target[:, :, i : i + 1] - uniform.decode(code, scale, bits)
        work[:, :, i + 1 :] += error * unit[:, None, i, i + 1 :]
    return codes


def round_along_neurons(
    factor: Tensor, bits: Tensor, feedback: Feedback, scale_grid: ScaleGrid, scales: Tensor, grid: str
) -> RoundedRows:
    """Round down factors, block after block of 32 neurons, each row under a scale fixed in advance.

    Args as for ``round_along_rank`` without the first axis, but feedback is ``[experts]`` of neurons, and
    there are no ``neuron_weights``.
    """
    if feedback.unit is None:  # then it is all the same which way one goes
        rank = Feedback(None, torch.ones(1, *factor.shape[:-1]))
        grid_of_one = ScaleGrid(scale_grid.low[None], scale_grid.step[None])
        one = factor[None], bits[None], rank, feedback.variance[None], grid_of_one, scales[None]
        rows = round_along_rank(*one, grid)
        return RoundedRows(*(tensor[0] for tensor in _tensors(rows)))
    size = factor.shape[-1]
    weights = feedback.variance[:, None]
    low, step = scale_grid.low.float(), scale_grid.step.float()
    start = scale_grid.encode(scales)
    if native.available(factor):
        scale_codes = native.choose_scales(factor, weights, bits, start, low, step, uniform.STEP)
    elif gpu.available(factor):
        scale_codes, _ = gpu.choose_scales(factor, weights, bits, start, low, step)
    else:
        scale_codes = nearby_codes(factor, weights, bits, start, low, step)
    scale = torch.exp2(low + scale_codes * step)
    codes = torch.empty(*bits.shape, row_codec.padded(size), dtype=torch.int32)
    values, errors = torch.empty_like(factor), torch.empty_like(factor)  # errors: factor minus value
    remaining = torch.zeros(bits.shape)
    for first in range(0, size, row_codec.BLOCK):
        last = min(first + row_codec.BLOCK, size)
        own = feedback.unit[:, first:last, first:last]
        # |(target - value) root|^2 is what the block costs once later blocks have made up for it.
        root = own * feedback.variance[:, None, first:last].sqrt()
        passed_on = errors[:, :, :first] @ feedback.unit[:, :first, first:last]
        target = factor[:, :, first:last] + passed_on @ torch.linalg.inv(own)
        if grid == "uniform":
            code = _round_columns(target, scale, bits, own)
            value = row_codec.decode(code, scale, bits, last - first, grid)
        else:
            code, value = row_codec.rounded(target, scale, root.square().sum(-1)[:, None], bits, grid)
        codes[:, :, first : first + row_codec.BLOCK], values[:, :, first:last] = code, value
        errors[:, :, first:last] = factor[:, :, first:last] - value
        remaining += ((target - value) @ root).square().sum(-1)
    return RoundedRows(codes, scale_codes, values, remaining)
