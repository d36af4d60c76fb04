"""Blocks of rows to codes where an error at one value is made up for at the values after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitsmoe_plugin.codec import row_codec, trellis
from bitsmoe_plugin.codec.backends import CoupledBlocks, backend_for
from bitsmoe_plugin.codec.block import BLOCK


def rounded(
    target: Tensor, scales: Tensor, unit: Tensor, variance: Tensor, bits: Tensor, grid: str
) -> tuple[Tensor, Tensor]:
    """Codes and values of one block of each row; on the uniform grid as if errors stayed where they are.

    Args:
        target: ``[e, r, n]`` float32, n at most 32.
        scales, bits: ``[e, r]``, see ``row_codec.encode``.
        unit, variance: ``[e, n, n]`` and ``[e, n]``, see ``trellis.coupled_search``.
        grid: see ``row_codec``.

    Returns:
        ``[e, r, 32]`` int32 and ``[e, r, n]`` float32.
    """
    size = target.shape[-1]
    # What a square of each error costs, apart from products of errors.
    alone = (unit.square() @ variance[..., None]).squeeze(-1)
    codes, _ = row_codec.rounded(target, scales, alone[:, None], bits, grid)
    fill = BLOCK - size
    unit, variance = pad(unit, (0, fill, 0, fill)).contiguous(), pad(variance, (0, fill)).contiguous()
    backend = backend_for(target)
    for width in torch.unique(bits).tolist():
        if not row_codec.uses_trellis(width, grid):
            continue
        pick = bits == width
        rows = pad(target[pick] / scales[pick][:, None], (0, fill))
        blocks = CoupledBlocks(rows, pick.nonzero()[:, 0], unit, variance, codes[pick])
        codes[pick] = backend.coupled_codes(trellis.table(width).to(target.device), blocks, width)
    return codes, row_codec.decode(codes, scales, bits, size, grid)
