"""Blocks of rows to codes where an error at one value is made up for at the values after it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from bitsmoe_plugin.codec.backends import backend_for
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
    fill = BLOCK - size
    unit, variance = pad(unit, (0, fill, 0, fill)).contiguous(), pad(variance, (0, fill)).contiguous()
    return backend_for(target).rounded_coupled(target, scales, alone[:, None], unit, variance, bits, grid)
