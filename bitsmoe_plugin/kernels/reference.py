"""Reference forward pass of packed experts: pure torch, float32, one expert at a time.

z = input_basis x (one basis for gate and up, or one each)
h = gating(sum_k z_k gate_k, sum_k z_k up_k)
c = sum over the token's experts of p * (down h)
y = output_basis c
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.packing import RowIndex, unpack_rows
from bitsmoe_plugin.statistics import Gating


def moe_forward(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    payload: Tensor,
    index: RowIndex,
    scales: Tensor,
    input_basis: Tensor,
    output_basis: Tensor,
    intermediate_size: int,
    grid: str,
    gating: Gating,
) -> Tensor:
    """Output of the routed experts.

    Args:
        hidden: ``[T, H]``.
        top_k_index: ``[T, k]`` int64; ids outside 0..E-1 are skipped.
        top_k_weights: ``[T, k]``.
        input_basis: ``[r, H]`` float32, or ``[2 r, H]``: gate's above up's.
        output_basis: ``[H, r]`` float32.
        grid: see ``coding``.

    Returns:
        ``[T, H]`` in the dtype of ``hidden``; computed in float32.
    """
    z = (hidden.float() @ input_basis.T).unflatten(-1, (-1, output_basis.shape[1]))
    coordinates = torch.zeros_like(z[:, 0])
    for expert in torch.unique(top_k_index).tolist():
        if not 0 <= expert < len(index.starts[0]):
            continue
        token, slot = torch.where(top_k_index == expert)
        selected = z[token]
        gate, up = (
            selected[:, -factor, order] @ rows
            for factor, (rows, order) in (
                (f, unpack_rows(payload, index, scales, f, expert, intermediate_size, grid)) for f in (0, 1)
            )
        )
        rows, order = unpack_rows(payload, index, scales, 2, expert, intermediate_size, grid)
        out = gating(gate, up) @ rows.T * top_k_weights[token, slot, None].float()
        update = torch.zeros_like(selected[:, 0])
        update[:, order] = out
        coordinates.index_add_(0, token, update)
    return (coordinates @ output_basis.T).to(hidden.dtype)
