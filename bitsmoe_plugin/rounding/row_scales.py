"""Scales of rows before they are put on their grid: of least error, widened, or from variances alone."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bitsmoe_plugin.codec import row_codec, uniform

_SAMPLE = 256
"""Values of a row from which the trellis's best scale is learnt: 8 blocks."""


def best_scales(rows: Tensor, weights: Tensor, bits: Tensor, grid: str) -> Tensor:
    """Scale of least weighted squared error of every row at its width.

    Args:
        rows: ``[..., n]``.
        weights: broadcast against ``rows``.
        bits: ``[...]`` int64.
        grid: see ``row_codec``.

    Returns:
        ``[...]`` float32; 0 for rows of width 0.
    """
    scales = uniform.best_scales(rows, weights, bits)
    if grid == "uniform":
        return scales
    # The trellis's best scale is another one than that of the uniform grid.
    rows, weights = _sample(rows), _sample(weights)
    values = row_codec.round_rows(rows, scales, weights, bits, grid)
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
    values = row_codec.round_rows(rows, scales, weights, bits, grid)
    energy, found = rows.square().sum(-1), (values * rows).sum(-1)
    ratio = (energy / found.clamp_min(1e-30)).clamp(1.0, 2.0)
    return torch.where(bits > 0, scales * ratio, scales)


@cache
def gaussian_scale(bits: int, grid: str, size: int, widened: bool) -> float:
    """Scale of ``best_scales``, or of ``unbiased_scales``, for Gaussian rows ``[size]`` of variance 1."""
    if bits == 0:
        return 0.0
    rows = row_codec.gaussian_rows(size)
    choose = unbiased_scales if widened else best_scales
    widths = torch.full((len(rows),), bits, device=rows.device)
    scales = choose(rows, torch.ones_like(rows), widths, grid)
    return float((scales / rows.square().mean(-1).sqrt()).mean())


def model_scales(variance: Tensor, bits: Tensor, grid: str, size: int, widened: bool) -> Tensor:
    """Scales ``[...]`` float32 of Gaussian rows of which only the variances ``[...]`` are known.

    Args:
        bits: ``[...]`` int64.
        size: values of a row.
        widened: see ``unbiased_scales``.
    """
    table = torch.zeros(17, device=variance.device)
    for width in torch.unique(bits).tolist():
        table[width] = gaussian_scale(width, grid, size, widened)
    return variance.clamp_min(0).sqrt() * table[bits]
