"""One launch of a Triton kernel, as a value: to be run, or to be compiled for another GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a ``triton.jit`` function.
        launch_grid: programs along up to three axes.
        arguments: tensors and integers by parameter name.
        constants: ``tl.constexpr`` parameters.
        num_warps: per program.
        num_stages: of loads that run ahead through shared memory; 1 for none.
    """

    kernel: Any
    launch_grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1


Launcher = Callable[[Launch], None]
"""What is done with each launch of a forward pass: run it, or compile it for another GPU."""


def run(launch: Launch) -> None:
    """Launch on the GPU that holds the tensors, on its current stream.

    Triton takes the GPU that is current, which need not be theirs: a model may lie on several.
    """
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    tensor = next(value for value in launch.arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(tensor):
        launch.kernel[launch.launch_grid](**launch.arguments, **launch.constants, **options)
