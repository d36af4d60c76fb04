"""Rounding of factors with error feedback (GPTQ, arXiv 2210.17323, applied to spectral factors).

Gate and up rows are visited along the rank: the error of a row is compensated in the rows after
it through the covariance of z. Down rows are visited along the neurons, through E[h h^T].
All functions are batched over experts; widths differ from row to row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin import coding, fast_rounding, gpu_rounding, grids, trellis
from bitsmoe_plugin.cholesky import upper_root

SCALE_LEVELS = 32
"""A row's scale is one of 32 (5 bits), equally spaced in the logarithm; see ``ScaleGrid``."""
_MAX_OCTAVES = 16.0
_HEADROOM_OCTAVES = 0.1
_LAZY = 32
"""Rows between which errors are passed on at once; rows further on get theirs in one product,"""
_FAR = 128
"""and rows further on than these theirs in one larger, more efficient product."""
_NEARBY = 2
"""Scale codes tried on either side of the planned one when a row's turn comes."""
_GPU_VALUES = 2**26
"""Values that a GPU rounds at once where no row waits for another."""
_SAMPLE = 256
"""Values of a row from which the trellis's best scale is learnt: 8 blocks."""


@dataclass(frozen=True)
class ScaleGrid:
    """Row scales of one factor and rank index over all experts: ``exp2(low + code * step)``.

    Attributes:
        low: ``[..., rank]`` float16, log2 of the smallest scale.
        step: ``[..., rank]`` float16, octaves between neighbouring codes.
    """

    low: Tensor
    step: Tensor

    @staticmethod
    def covering(scales: Tensor, used: Tensor) -> ScaleGrid:
        """The grid that spans the used ones of ``scales`` ``[..., experts, rank]`` (bool mask alike)."""
        log = scales.clamp_min(2.0**-60).log2()
        high = torch.where(used, log, -60.0).amax(-2)
        low = torch.where(used, log, 60.0).amin(-2).minimum(high)
        low = torch.maximum(low, high - _MAX_OCTAVES).to(torch.float16)
        # Float16 may round the step down; the headroom keeps the largest scale inside, and leaves
        # room for rows that grow when they take over the errors of others.
        step = (high + _HEADROOM_OCTAVES - low.float()).clamp_min(0) / (SCALE_LEVELS - 1)
        return ScaleGrid(low, step.to(torch.float16))

    def stacked_with(self, other: ScaleGrid) -> ScaleGrid:
        """One more factor's grid ``[rank]`` after these ``[factors, rank]``."""
        return ScaleGrid(torch.cat([self.low, other.low[None]]), torch.cat([self.step, other.step[None]]))

    def decode(self, codes: Tensor) -> Tensor:
        """Scales ``[..., experts, rank]`` float32 of codes alike."""
        return torch.exp2(self.low.float()[..., None, :] + codes * self.step.float()[..., None, :])

    def encode(self, scales: Tensor) -> Tensor:
        """Nearest codes ``[..., experts, rank]``, float32 whole numbers."""
        log = scales.clamp_min(2.0**-60).log2() - self.low.float()[..., None, :]
        return (log / self.step.float()[..., None, :].clamp_min(1e-6)).round_().clamp_(0, SCALE_LEVELS - 1)


@dataclass(frozen=True)
class RoundedRows:
    """Rounded rows of one or more factors.

    Attributes:
        codes: ``[..., experts, rank, padded(I)]`` int32, see ``coding``.
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
class Feedback:
    """Second moments C = unit diag(variance) unit^T of what a factor's rows or columns are multiplied with.

    With d the errors (row minus value) of the rows rounded so far, row k is rounded to make up for
    them, that is, towards row + unit[:k, k]^T d; what is left of its target costs variance[k] per square:
    what the later coordinates do not explain of coordinate k.
    (QuIP's form of the feedback, arXiv 2307.13304; GPTQ's, from the inverse of C, has the same targets.)

    Attributes:
        unit: ``[..., n, n]`` float32, upper triangular, ones on the diagonal; None: errors are not passed on.
        variance: ``[..., n]`` float32.
    """

    unit: Tensor | None
    variance: Tensor

    @staticmethod
    def of(moments: Tensor, damping: float) -> Feedback:
        """Of damped second moments ``[..., n, n]``; ``damping`` is the share of the mean diagonal added."""
        n = moments.shape[-1]
        units, variances = [], []
        for matrix in moments.reshape(-1, n, n):
            diagonal = matrix.diagonal()
            floor = damping * diagonal.mean().clamp_min(1e-30)
            root = upper_root(matrix + torch.diag(floor.expand(n)))
            scale = root.diagonal().clone()
            units.append(root.div_(scale))
            variances.append(scale.square_())
        shape = moments.shape[:-2]
        return Feedback(torch.stack(units).view(moments.shape), torch.stack(variances).view(*shape, n))

    @staticmethod
    def none(diagonal: Tensor, damping: float) -> Feedback:
        """Of the diagonals ``[..., n]`` of the moments alone: errors are not passed on."""
        return Feedback(None, diagonal + damping * diagonal.mean(-1, keepdim=True).clamp_min(1e-30))

    def __getitem__(self, index: Any) -> Feedback:
        """Of some of the experts."""
        return Feedback(None if self.unit is None else self.unit[index], self.variance[index])


def stacked_feedback(parts: list[Feedback], dim: int = 0) -> Feedback:
    """Several as one, along a new axis."""
    units = [f.unit for f in parts if f.unit is not None]
    variance = torch.stack([f.variance for f in parts], dim)
    return Feedback(torch.stack(units, dim) if units else None, variance)


def best_scales(rows: Tensor, weights: Tensor, bits: Tensor, grid: str) -> Tensor:
    """Scale of least weighted squared error of every row at its width.

    Args:
        rows: ``[..., n]``.
        weights: broadcast against ``rows``.
        bits: ``[...]`` int64.
        grid: see ``coding``.

    Returns:
        ``[...]`` float32; 0 for rows of width 0.
    """
    scales = grids.best_scales(rows, weights, bits)
    if grid == "uniform":
        return scales
    # The trellis's best scale is another one than that of the uniform grid.
    rows, weights = _sample(rows), _sample(weights)
    values = coding.round_rows(rows, scales, weights, bits, grid)
    ratio = (weights * rows * values).sum(-1) / (weights * values.square()).sum(-1).clamp_min(1e-30)
    return scales * ratio.clamp(0.5, 2.0)


def _sample(rows: Tensor) -> Tensor:
    """The values of rows from which their scales are learnt: their neurons stand in no order."""
    return rows[..., :_SAMPLE]


def unbiased_scales(rows: Tensor, weights: Tensor, bits: Tensor, grid: str) -> Tensor:
    """As ``best_scales``, then widened so that rounding does not shrink the row on average.

    A rounded row of least squared error is shorter than the row it stands for, and its error
    points along it. A neuron is excited by just the inputs that lie along its weights, so that
    part of the error does more harm than its size says: trading it for more random error pays
    for gate and up (perplexity of the bundled model at 2 bits: loss 3.8 % -> 3.1 %).
    """
    scales = best_scales(rows, weights, bits, grid)
    rows, weights = _sample(rows), _sample(weights)
    values = coding.round_rows(rows, scales, weights, bits, grid)
    energy, kept = rows.square().sum(-1), (values * rows).sum(-1)
    ratio = (energy / kept.clamp_min(1e-30)).clamp(1.0, 2.0)
    return torch.where(bits > 0, scales * ratio, scales)


@cache
def gaussian_scale(bits: int, grid: str, size: int, widened: bool) -> float:
    """Scale of ``best_scales``, or of ``unbiased_scales``, for Gaussian rows ``[size]`` of variance 1."""
    if bits == 0:
        return 0.0
    rows = coding.gaussian_rows(size)
    choose = unbiased_scales if widened else best_scales
    with torch.device(rows.device):
        scales = choose(rows, torch.ones_like(rows), torch.full((len(rows),), bits), grid)
    return float((scales / rows.square().mean(-1).sqrt()).mean())


def model_scales(variance: Tensor, bits: Tensor, grid: str, size: int, widened: bool) -> Tensor:
    """Scales ``[...]`` float32 of Gaussian rows of which only the variances ``[...]`` are known.

    Args:
        bits: ``[...]`` int64.
        size: values of a row.
        widened: see ``unbiased_scales``.
    """
    table = torch.zeros(17)
    for width in torch.unique(bits).tolist():
        table[width] = gaussian_scale(width, grid, size, widened)
    return variance.clamp_min(0).sqrt() * table[bits]


def _choose_scales(
    rows: Tensor, weights: Tensor, bits: Tensor, start: Tensor, low: Tensor, step: Tensor
) -> Tensor:
    """Scale codes ``[...]`` uint8 near ``start`` ``[...]``, for rows ``[..., n]``.

    Judged on the uniform grid, which ranks neighbouring scales like the trellis, but is faster.

    Args:
        low, step: broadcast against ``start``, see ``ScaleGrid``.
    """
    offsets = torch.arange(-_NEARBY, _NEARBY + 1).view(-1, *[1] * start.dim())
    codes = (start + offsets).clamp(0, SCALE_LEVELS - 1)
    scales = torch.exp2(low + codes * step)
    width = bits[..., None]
    errors = [
        (grids.round_to_grid(rows, scale[..., None], width) - rows).square_().mul_(weights).sum(-1)
        for scale in scales
    ]
    return codes.gather(0, torch.stack(errors).argmin(0)[None])[0].to(torch.uint8)


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
            code = _choose_scales(row, self.weights, width, self.start[:, :, k], low, step)
            scale = torch.exp2(low + code * step)
            coded = coding.encode(row, scale, self.weights, width, grid)
            value = coding.decode(coded, scale, width, size, grid)
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
            code, scale = gpu_rounding.choose_scales(rows, weights, width, self.start[:, :, some], low, step)
            coded, value = gpu_rounding.rounded(rows, scale, weights, width, grid)
            left = (rows - value).square_().mul_(weights)
            self.rows.codes[:, :, some], self.rows.scale_codes[:, :, some] = coded, code
            self.rows.values[:, :, some], self.rows.errors[:, :, some] = value, left.sum(-1)
            self.work[:, :, some] -= value
            if self.unit is not None:
                share = self.unit[:, :, k, k + 1 : last, None]
                target[:, :, k + 1 - first :].addcmul_(share, self.work[:, :, some])

    def round_fast(self, first: int, last: int, target: Tensor, grid: str) -> None:
        """The same, compiled."""
        tables = {bits: trellis.table(bits) for bits in trellis.WIDTHS if coding.uses_trellis(bits, grid)}
        parts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        rows = {field.name: getattr(self.rows, field.name) for field in fields(self.rows)}
        fast_rounding.round_rank(first, last, target=target, steps=grids.STEP, tables=tables, **parts, **rows)


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
        grid: see ``coding``.
        fast: use compiled code, if there is any for the device.
        in_place: ``factors``, contiguous, may be overwritten.

    Returns:
        see ``RoundedRows``.
    """
    rank, size = factors.shape[-2:]
    rows = RoundedRows(
        torch.empty(*bits.shape, coding.padded(size), dtype=torch.int32),
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
    if fast and fast_rounding.available(factors):
        round_part = loop.round_fast
    elif fast and gpu_rounding.available(factors):
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
    codes = torch.zeros(*bits.shape, coding.BLOCK, dtype=torch.int32)
    scale, bits = scale[..., None], bits[..., None]
    for i in range(work.shape[-1]):
        code = grids.encode(work[:, :, i : i + 1], scale, bits)
        codes[:, :, i] = code[..., 0].to(torch.int32)
        error = target[:, :, i : i + 1] - grids.decode(code, scale, bits)
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
    if fast_rounding.available(factor):
        scale_codes = fast_rounding.choose_scales(factor, weights, bits, start, low, step, grids.STEP)
    elif gpu_rounding.available(factor):
        scale_codes, _ = gpu_rounding.choose_scales(factor, weights, bits, start, low, step)
    else:
        scale_codes = _choose_scales(factor, weights, bits, start, low, step)
    scale = torch.exp2(low + scale_codes * step)
    codes = torch.empty(*bits.shape, coding.padded(size), dtype=torch.int32)
    values, errors = torch.empty_like(factor), torch.empty_like(factor)  # errors: factor minus value
    remaining = torch.zeros(bits.shape)
    for first in range(0, size, coding.BLOCK):
        last = min(first + coding.BLOCK, size)
        own = feedback.unit[:, first:last, first:last]
        # |(target - value) root|^2 is what the block costs once later blocks have made up for it.
        root = own * feedback.variance[:, None, first:last].sqrt()
        passed_on = errors[:, :, :first] @ feedback.unit[:, :first, first:last]
        target = factor[:, :, first:last] + passed_on @ torch.linalg.inv(own)
        if grid == "uniform":
            code = _round_columns(target, scale, bits, own)
            value = coding.decode(code, scale, bits, last - first, grid)
        else:
            code, value = coding.rounded(target, scale, root.square().sum(-1)[:, None], bits, grid)
        codes[:, :, first : first + coding.BLOCK], values[:, :, first:last] = code, value
        errors[:, :, first:last] = factor[:, :, first:last] - value
        remaining += ((target - value) @ root).square().sum(-1)
    return RoundedRows(codes, scale_codes, values, remaining)
