"""Search for the trellis codes of blocks in which errors are passed on from value to value.

What a block costs is not a sum over its values: with d the errors (value wanted minus value found), value k
adds variance[k] times the square of d[k] + sum over j < k of d[j] unit[j, k]. So every path of the Viterbi
search carries what it passes on to later values (per-survivor processing), which is no longer sure to find
the best path: codes found before are kept where theirs is better. It begins and ends in their state: to try
those in which the best path without bounds begins and ends costs four times as much (examples/quality.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.codec.backends.interface import CoupledBlocks
from bitsmoe_plugin.codec.block import BLOCK

WINDOW = 8
_UNREACHABLE = 1e30
_BATCH = {"cpu": 2**11, "cuda": 2**14}
"""Blocks at once: on a GPU about 1 GB (est.), so that a large layer takes few launches of kernels."""


def search_reference(values: Tensor, blocks: CoupledBlocks, bits: int) -> Tensor:
    """Codes ``[n, 32]`` int32 of no more cost than those found before.

    Args:
        values: ``[2**WINDOW]`` float32, what each window decodes to.
        bits: 1 to 4.
    """
    batch = _BATCH.get(blocks.rows.device.type, _BATCH["cpu"])
    parts = (tensor.split(batch) for tensor in (blocks.rows, blocks.owner, blocks.codes))
    found = [
        _search_some(values, rows, blocks.unit[owner], blocks.variance[owner], codes, bits)
        for rows, owner, codes in zip(*parts, strict=True)
    ]
    return torch.cat(found) if found else blocks.codes


def seams(codes: Tensor, bits: int) -> Tensor:
    """States ``[n]`` int64 in which the rings of blocks of codes ``[n, 32]`` begin and end."""
    state = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for i in range(BLOCK - -(-WINDOW // bits), BLOCK):
        state = (codes[:, i].long() << (WINDOW - bits) | state) >> bits
    return state


def _search_some(
    values: Tensor, x: Tensor, unit: Tensor, variance: Tensor, codes: Tensor, bits: int
) -> Tensor:
    given, seam = (values, x, unit, variance, bits), seams(codes, bits)
    cost, found = _paths(*given, seam)
    return torch.where((cost < _cost(*given, codes, seam))[:, None], found, codes)


def _cost(
    values: Tensor, x: Tensor, unit: Tensor, variance: Tensor, bits: int, codes: Tensor, seam: Tensor
) -> Tensor:
    """What blocks of codes cost, ``[n]``."""
    errors = torch.empty_like(x)
    for k in range(BLOCK):
        window = codes[:, k].long() << (WINDOW - bits) | seam
        errors[:, k], seam = x[:, k] - values[window], window >> bits
    return ((errors[:, None] @ unit)[:, 0].square() * variance).sum(-1)


def _paths(
    values: Tensor, x: Tensor, unit: Tensor, variance: Tensor, bits: int, seam: Tensor
) -> tuple[Tensor, Tensor]:
    """Costs ``[n]`` and codes ``[n, 32]`` int32 of the best paths from ``seam`` ``[n]`` to it."""
    n, states = len(x), 1 << (WINDOW - bits)
    windows = torch.arange(1 << WINDOW, device=x.device).view(states, 1 << bits)
    before, value, trace = windows & (states - 1), values[windows], []
    metric, passed = x.new_full((n, states), _UNREACHABLE), x.new_zeros(n, states, BLOCK)
    metric.scatter_(1, seam[:, None], 0.0)
    for k in range(BLOCK):
        error = x[:, k, None, None] - value
        left = error + passed[:, before, k]
        cost = metric[:, before] + variance[:, k, None, None] * left.square()
        metric, choice = cost.min(-1)
        trace.append(choice)
        came = before.expand(n, -1, -1).gather(2, choice[..., None])
        own = error.gather(2, choice[..., None])
        passed = passed.gather(1, came.expand(-1, -1, BLOCK)) + own * unit[:, None, k]
    state, codes = seam, []
    for choice in reversed(trace):
        window = (state << bits) | choice.gather(1, state[:, None])[:, 0]
        codes.append(window >> (WINDOW - bits))
        state = window & (states - 1)
    return metric.gather(1, seam[:, None])[:, 0], torch.stack(codes[::-1], 1).to(torch.int32)
