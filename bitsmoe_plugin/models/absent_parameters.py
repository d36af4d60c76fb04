"""Experts whose parameters are not there while transformers loads the rest of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class _Absent:
    """Whatever transformers asks of a tensor that it need not fill."""

    _is_hf_initialized = True


def stand_for_absent(module: Any, names: Iterable[str]) -> None:
    """Have attributes where parameters were: initialization of the module around it may look for them
    (Qwen3-Omni), and leaves these as they are. Parameters of the names take their places."""
    module._is_hf_initialized = True
    for name in names:
        setattr(module, name, _Absent())


def take_away_absent(model: nn.Module) -> None:
    """The other way round, in all modules; parameters stay."""
    for module in model.modules():
        for name in [n for n, value in vars(module).items() if isinstance(value, _Absent)]:
            delattr(module, name)
