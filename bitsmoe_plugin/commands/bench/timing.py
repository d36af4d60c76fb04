"""How ``bench layer`` takes time, on a CPU and on a GPU, and CUDA graphs of what it measures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.commands.bench.contenders import Contender

WARM_UP = 0.5
"""Seconds of work before the first measurement on a GPU, whose clocks are low while it is idle."""


@dataclass(frozen=True)
class Stopwatch:
    """Seconds of calls, whose weights come from memory.

    Attributes:
        evict: on a GPU, larger than its cache and overwritten before each call. None on a CPU, where calls
            one after the other use other experts and the methods take turns.
    """

    evict: Tensor | None

    @classmethod
    def on(cls, device: str) -> Stopwatch:
        if device == "cpu":
            return cls(None)
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        return cls(torch.empty(size, dtype=torch.uint8, device=device))

    def seconds(self, call: Callable[[], object], launched_before: bool = False) -> float:
        """Of one call.

        Args:
            launched_before: the GPU is kept busy until the call is launched, so that the launch itself takes
                no time; for graphs, of which a model has one for all its layers.
        """
        if self.evict is None:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.evict.zero_()
        if not launched_before:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def warm_up(self, calls: Sequence[Callable[[], object]]) -> None:
        """Once each, compiling what has to be; on a GPU again and again for ``WARM_UP`` seconds."""
        for call in calls:
            call()
        end = time.perf_counter() + (WARM_UP if self.evict is not None else 0)
        while time.perf_counter() < end:
            for call in calls:
                call()
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of one call.

    Attributes:
        graph: reads ``inputs``.
        inputs: as the call's.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]

    def load(self, batch: Sequence[Tensor]) -> None:
        """Make ``batch`` the inputs of the next replay."""
        for target, value in zip(self.inputs, batch, strict=True):
            target.copy_(value)

    def replay(self) -> None:
        self.graph.replay()


def capture(entry: Contender, batch: tuple[Tensor, ...]) -> Captured | None:
    """A graph of a call that was made before; None if the contender says that it waits for the device.

    Warns:
        UserWarning: it could not be captured all the same, with the reason.
    """
    if not entry.capturable:
        return None
    graph, inputs = torch.cuda.CUDAGraph(), tuple(tensor.clone() for tensor in batch)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            entry.forward(*inputs)
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"no CUDA graph of {entry.name}: {error}", stacklevel=2)
        return None
    return Captured(graph, inputs)
