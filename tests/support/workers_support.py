"""A program for torchrun: quantize as one of several processes, in groups of few experts."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import resume_support
import torch

from bitsmoe_plugin.base import devices
from bitsmoe_plugin.base.workers import connected
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline import run as pipeline_run

SIZE = 140_000
"""Bytes; some of its linear layers have to be in fewer bits then."""


def die_at(number: int) -> None:
    """Kill this process when it begins so-many-th of its turns, over both passes; if negative: an error."""
    calls, take = [0], pipeline_run.release_free_memory

    def count() -> None:
        calls[0] += 1
        if calls[0] == -number:
            raise ValueError(f"the disk burns in turn {calls[0]}")
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        take()

    pipeline_run.release_free_memory = count


def compute_without_end() -> None:
    """In the sixth turn, over both passes, for ten minutes."""
    calls, run = [0], pipeline_run.release_free_memory

    def count() -> None:
        calls[0] += 1
        end = time.monotonic() + 600
        while calls[0] == 6 and time.monotonic() < end:
            torch.ones(100, 100) @ torch.ones(100, 100)
        run()

    pipeline_run.release_free_memory = count


def run_out_of_memory() -> None:
    """Once, in the second layer that is run, with more than two blocks at once."""
    calls, run = [0], LayerwiseForward._run

    def limited(forward: LayerwiseForward, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 and forward.at_once > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(forward, *args)

    LayerwiseForward._run = limited  # type: ignore[method-assign]


if __name__ == "__main__":
    model, out, groups_of, dies_at = sys.argv[1:]
    torch.set_num_threads(1)
    devices.CPU_WORKING_SET = int(groups_of) * 32**2  # hidden_size of the tests' models
    with connected() as workers:
        if workers.rank == 1:
            die_at(int(dies_at))
        elif Path(out).name == "endless":
            compute_without_end()
        if Path(out).name == "little" and workers.rank == workers.size - 1:
            run_out_of_memory()
        # Another text for one of the processes, if its rank is named.
        options: dict[str, Any] = {"seed": workers.rank} if "differ" in Path(out).name else {}
        options |= {"size": SIZE} if "sized" in Path(out).name else {}
        quantize_to_directory(model, Path(out), resume_support.config(**options))
