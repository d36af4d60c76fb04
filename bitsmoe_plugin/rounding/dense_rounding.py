"""Rounding of a linear layer to codes around zero with one scale per group of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.codec.dense import DenseScheme
from bitsmoe_plugin.spectral.error_feedback import Feedback

_CANDIDATES = torch.linspace(0.7, 1.1, 21, dtype=torch.float32, device="cpu")
"""Scales that are tried for a group, over the one at which its largest weight has the largest code."""
_BLOCK = 64
"""Inputs between which errors are passed on at once; those further on get theirs in one product."""


def round_linear(
    weight: Tensor, scheme: DenseScheme, moments: Tensor | None, damping: float, feedback: bool
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a layer.

    8 bits are rounded directly. With 4, the scale of a group is the candidate of least error, and the error
    of an input's weights is made up for in those of inputs after it (GPTQ, arXiv 2210.17323), the strongest
    input first; the scales stay.

    Args:
        weight: ``[outputs, inputs]``.
        moments: ``[inputs, inputs]`` float32, second moments of the inputs; None: all alike.
        damping: share of the mean of the diagonal of ``moments`` that is added to it.
        feedback: pass errors on.

    Returns:
        ``[outputs, inputs]`` int8; ``[outputs, groups]`` of the dtype of ``weight``, positive.
    """
    values = weight.detach().float()
    groups = values.unflatten(1, (-1, scheme.group_size))
    if scheme.bits == 8:
        scales = _stored(groups.abs().amax(-1) / scheme.largest, weight.dtype)
        return _codes(groups, scales[..., None].float(), scheme).flatten(1), scales
    if moments is None or not bool(moments.diagonal().any()):
        moments = torch.eye(values.shape[1], device=values.device)
    scales = _searched(groups, moments.diagonal().clamp_min(0), scheme, weight.dtype)
    if not feedback:
        return _codes(groups, scales[..., None].float(), scheme).flatten(1), scales
    order = moments.diagonal().argsort(descending=True, stable=True)
    passing = Feedback.of(moments[order][:, order], damping)
    columns = scales.float().repeat_interleave(scheme.group_size, 1)[:, order]
    codes = torch.empty_like(values, dtype=torch.int8)
    codes[:, order] = _along_inputs(values[:, order], columns, passing, scheme)
    return codes, scales


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As they are kept: positive, and exact in bfloat16 where weights are float32, for readers in either."""
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    kept = scales.to(torch.bfloat16 if dtype == torch.float32 else dtype)
    return kept.clamp_min(torch.finfo(kept.dtype).smallest_normal * torch.finfo(kept.dtype).eps).to(dtype)


def _codes(values: Tensor, scales: Tensor, scheme: DenseScheme) -> Tensor:
    return (values / scales).round_().clamp_(-scheme.largest - 1, scheme.largest).to(torch.int8)


def _searched(groups: Tensor, weights: Tensor, scheme: DenseScheme, dtype: torch.dtype) -> Tensor:
    """The scale of least error of each group, squares by the ``weights`` of inputs."""
    weights = weights.unflatten(0, (-1, scheme.group_size))
    largest = groups.abs().amax(-1) / scheme.largest
    best = _stored(largest, dtype)
    least = torch.full_like(largest, torch.inf)
    for factor in _CANDIDATES.tolist():
        scales = _stored(largest * factor, dtype)
        wide = scales[..., None].float()
        errors = ((_codes(groups, wide, scheme) * wide - groups).square() * weights).sum(-1)
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


def _along_inputs(values: Tensor, scales: Tensor, passing: Feedback, scheme: DenseScheme) -> Tensor:
    """Codes of inputs in the order of ``passing``, see ``Feedback``."""
    assert passing.unit is not None
    codes = torch.empty_like(values, dtype=torch.int8)
    errors = torch.zeros_like(values)
    for first in range(0, values.shape[1], _BLOCK):
        last = min(first + _BLOCK, values.shape[1])
        unit = passing.unit[:last, first:last]
        targets = values[:, first:last] + errors[:, :first] @ unit[:first]
        for column in range(first, last):
            target = targets[:, column - first] + errors[:, first:column] @ unit[first:column, column - first]
            code = _codes(target, scales[:, column], scheme)
            codes[:, column] = code
            errors[:, column] = values[:, column] - code * scales[:, column]
    return codes
