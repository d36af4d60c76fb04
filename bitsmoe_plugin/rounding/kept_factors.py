"""Factors of a layer's experts, which rounding needs twice: for scales, and to be rounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitsmoe_plugin.base.free_memory import available_memory
from bitsmoe_plugin.codec.layout import LayerShape

_SHARE = 0.25
"""Of the memory that is free, that factors may take."""


def kept_bytes(shape: LayerShape, device: torch.device) -> int:
    """What the factors of a layer's experts take if they are kept; 0 where they are computed twice instead,
    because there is too little memory now."""
    needed, free = 4 * shape.weights, available_memory(device)
    return needed if free is not None and needed <= _SHARE * free else 0


class KeptFactors:
    """Of groups of experts."""

    def __init__(self, compute: Callable[[list[int]], Tensor], keep: bool) -> None:
        """
        Args:
            compute: the factors of some experts.
        """
        self._compute, self._keep = compute, keep
        self._kept: dict[int, Tensor] = {}

    def look(self, experts: list[int]) -> Tensor:
        """Of a group, not to be changed."""
        found = self._compute(experts)
        if self._keep:
            self._kept[experts[0]] = found
        return found

    def take(self, experts: list[int]) -> Tensor:
        """Of a group that was looked at, for the caller to change."""
        kept = self._kept.pop(experts[0], None)
        return self._compute(experts) if kept is None else kept
