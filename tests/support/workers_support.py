"""Quantize as one of several processes, in groups of few experts: a program for torchrun, and the same in
processes that are forked with all libraries in memory, which takes a second instead of ten."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
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


def work(model: str, out: str, groups_of: int, dies_at: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    devices.CPU_WORKING_SET = groups_of * 32**2  # hidden_size of the tests' models
    with connected() as workers:
        if workers.rank == 1:
            die_at(dies_at)
        elif Path(out).name == "endless":
            compute_without_end()
        if Path(out).name == "little" and workers.rank == workers.size - 1:
            run_out_of_memory()
        # Another text for one of the processes, if its rank is named.
        options: dict[str, Any] = {"seed": workers.rank} if "differ" in Path(out).name else {}
        options |= {"size": SIZE} if "sized" in Path(out).name else {}
        quantize_to_directory(model, Path(out), resume_support.config(**options))


def _forked(environment: dict[str, str], errors: str, *arguments: Any) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(environment)
    work(*arguments)


def run_forked(
    model: Path, out: Path, processes: int, groups_of: int, dies_at: int
) -> subprocess.CompletedProcess[str]:
    """As ``torchrun``, but nobody ends the others when one fails: they are told by our own links alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    errors = tempfile.NamedTemporaryFile(mode="r", encoding="utf-8", errors="replace")  # noqa: SIM115
    with errors:
        children = []
        for rank in range(processes):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (environment, errors.name, str(model), str(out), groups_of, dies_at)
            children.append(resume_support.CONTEXT.Process(target=_forked, args=arguments))
            children[-1].start()
        try:
            for child in children:
                child.join(300)
        finally:
            for child in children:
                child.kill()
        codes = [child.exitcode for child in children]
        return subprocess.CompletedProcess([], next((code for code in codes if code), 0), "", errors.read())


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
