"""Memory of large tensors that are needed again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Tensors of one turn in the place of those of the turn before.

    The CPU's allocator gives large blocks back to the system, which clears every page of a new one. For the
    factors, codes and values of a layer of Qwen3-30B-A3B's sizes ``method="fast"`` took 2 s of 29 for that.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def empty(
        self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Contiguous, on the device of ``like``, with any values: those of the tensor that had this name
        before, which must not be needed any more.

        Args:
            dtype: that of ``like`` unless given.
        """
        key, count = (name, dtype or like.dtype, like.device), math.prod(shape)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < count:
            self._kept.pop(key, None)
            del kept  # before there is a larger one
            kept = self._kept[key] = torch.empty(count, dtype=key[1], device=like.device)
        return kept[:count].view(*shape)
