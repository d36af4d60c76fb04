"""The outputs of a token's experts in rank space, summed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher


def combine(parts: Tensor, ids: Tensor, experts: int, dtype: torch.dtype, launch: Launcher) -> Tensor:
    """``[T, r]`` of ``dtype``: ``parts`` ``[T * k, r]`` float32 summed over the slots with an expert."""
    (tokens, slots), rank = ids.shape, parts.shape[1]
    total = parts.new_empty((tokens, rank), dtype=dtype)
    arguments = {"parts": parts, "ids": ids, "total": total}
    constants = {"EXPERTS": experts, "RANK": rank, "SLOTS": slots, "COLUMNS": 1024}
    launch(
        Launch(
            kernel=combine_kernel,
            launch_grid=(tokens, triton.cdiv(rank, 1024)),
            arguments=arguments,
            constants=constants,
            num_warps=4,
        )
    )
    return total


@triton.jit
def combine_kernel(
    parts,
    ids,
    total,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """total[token]: the parts of its slots in order, but of those with no expert. Grid: tokens, columns."""
    token = tl.program_id(0)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros([COLUMNS], tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(ids + pair)
        keep = (k < RANK) & (expert >= 0) & (expert < EXPERTS)
        result += tl.load(parts + pair * RANK + k, mask=keep, other=0.0)
    tl.store(total + token * RANK + k, result, mask=k < RANK)
