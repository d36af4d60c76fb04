"""Random rows of many widths for the tests of rounding and of scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.codec.row_codec import GRIDS
from bitsmoe_plugin.presets import ALL_WIDTHS

# More rows than are rounded between two products, and one block of values and a part of another.
EXPERTS, RANK, SIZE = 2, 36, 40
both_grids = pytest.mark.parametrize("grid", GRIDS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed_widths(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(ALL_WIDTHS)[torch.randint(len(ALL_WIDTHS), (EXPERTS, RANK), generator=generator)]
