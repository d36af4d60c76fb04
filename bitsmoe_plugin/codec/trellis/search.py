"""Search for the best trellis codes of many blocks at once, and the reference for the compiled search.

A Viterbi search per block of 32 values. The ring of a block is closed in one pass where it can be: begun some
values before the seam, the best path tells the state at the seam, and the best path that ends in that state
mostly began in it, too. Blocks where it did not are searched again, bound to begin and end there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.codec.backends import backend_for
from bitsmoe_plugin.codec.block import BLOCK

WINDOW = 8
_WARM = 24
"""Values before a block's seam that settle its state there. Error of a 2-bit Gaussian at 12, 16, 24 and 32:
0.0829, 0.0816, 0.0801, 0.0795."""
_UNREACHABLE = 1e30
_BATCH = 2**13


def search(values: Tensor, rows: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Codes of least weighted squared error, up to the choice of the state at a block's seam.

    Args:
        values: ``[2**WINDOW]`` float32, what each window decodes to.
        rows: ``[n, columns]`` float32, columns a multiple of 32.
        weights: ``[n, columns]`` float32, importance of each value, not negative.
        bits: 1 to 4.

    Returns:
        ``[n, columns]`` int32, each below 2**bits.
    """
    return backend_for(rows, weights).trellis_codes(values, rows, weights, bits)


def search_reference(values: Tensor, rows: Tensor, weights: Tensor, bits: int) -> Tensor:
    """``search`` in plain torch."""
    blocks = rows.reshape(-1, BLOCK).split(_BATCH)
    scaled = weights.reshape(-1, BLOCK)
    # Only ratios of weights within a block matter; unit size keeps sums in float32's best range.
    scaled = scaled / scaled.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    codes = [_search_blocks(values, x, w, bits) for x, w in zip(blocks, scaled.split(_BATCH), strict=True)]
    if not codes:
        return torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    return torch.cat(codes).view(rows.shape)


def _advance(
    values: Tensor, x: Tensor, weights: Tensor, bits: int, metric: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Run the trellis over values ``[n, count]``.

    Args:
        metric: ``[n, states]`` cost of the best path into every state. A state is the upper
            WINDOW - bits bits of the window before.

    Returns:
        the costs after the last value, and for each value the best windows' lower bits ``[n, states]``.
    """
    states = 1 << (WINDOW - bits)
    windows = torch.arange(1 << WINDOW, device=x.device).view(states, 1 << bits)
    before, value, trace = windows & (states - 1), values[windows], []
    for i in range(x.shape[1]):
        cost = metric[:, before] + weights[:, i, None, None] * (x[:, i, None, None] - value).square()
        metric, choice = cost.min(-1)
        trace.append(choice)
    return metric, trace


def _trace_back(trace: list[Tensor], bits: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[n, count]`` of the best paths into ``state`` ``[n]``, and the states where they began."""
    codes = []
    for choice in reversed(trace):
        window = (state << bits) | choice.gather(1, state[:, None])[:, 0]
        codes.append(window >> (WINDOW - bits))
        state = window & ((1 << (WINDOW - bits)) - 1)
    return torch.stack(codes[::-1], 1).to(torch.int32), state


def _search_blocks(values: Tensor, x: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Codes ``[n, BLOCK]`` int32."""
    metric = x.new_zeros(len(x), 1 << (WINDOW - bits))
    metric, _ = _advance(values, x[:, -_WARM:], weights[:, -_WARM:], bits, metric)
    metric, trace = _advance(values, x, weights, bits, metric)
    _, seam = _trace_back(trace, bits, metric.argmin(-1))
    codes, begun = _trace_back(trace, bits, seam)
    again = torch.nonzero(begun != seam).flatten()
    if len(again):
        bound = torch.full_like(metric[again], _UNREACHABLE).scatter_(1, seam[again, None], 0.0)
        _, trace = _advance(values, x[again], weights[again], bits, bound)
        codes[again] = _trace_back(trace, bits, seam[again])[0]
    return codes
