"""Quantization in child processes that may be killed; imported by a server that forks them, to be quick."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.integrations.transformers import quantize_to_directory

TOKENS = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(1)).flatten().tolist()
OPTIONS: dict[str, Any] = {"bits": 8, "sequence_length": 32, "basis_group_size": 16, "held_out": 0.25}

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "bitsmoe_plugin.pipeline.quantize",
        "transformers.models.deepseek_v3.modeling_deepseek_v3",
        "transformers.models.auto.tokenization_auto",
    ]
)


def config(**changes: Any) -> BitsMoEConfig:
    """Options of a quick run."""
    return BitsMoEConfig(**{**OPTIONS, "dataset": [TOKENS], **changes})


def _quantize(
    model: str,
    out: str,
    options: dict[str, Any],
    dies_at: int,
    errors: str,
    file_bytes: int | None,
    changes: int | None,
) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_bytes is not None:  # as on a full disk: what grows beyond is refused by the system
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if dies_at:
        _die_at_rename(dies_at)
    count = None if changes is None else _die_before_change(changes, str(Path(out).parent))
    try:
        quantize_to_directory(model, Path(out), config(**options))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    if count is not None:
        print(f"{count()} changes of files", file=sys.stderr, flush=True)


_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "open"}


def _die_before_change(number: int, folder: str) -> Callable[[], int]:
    """Kill this process before its so-many-th change of a file or directory below ``folder``.

    Changes are renames, removals, new directories, and files that are opened, to be written or, as all that
    are synced are, to be read; what safetensors writes lies between two of them. Returns their number so far.
    """
    calls = [0]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if event in _CHANGES and arguments else None
        if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(folder):
            return
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    return lambda: calls[0]


def _die_at_rename(number: int) -> None:
    """Kill this process around its so-many-th rename: before it if the number is odd, or else after it."""
    calls, rename = [0], os.replace

    def replace(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == number and number % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


def start(
    model: Path,
    out: Path,
    dies_at: int = 0,
    file_bytes: int | None = None,
    changes: int | None = None,
    **options: Any,
) -> Any:
    """A child process that quantizes ``model`` to ``out``; its stderr is appended to ``out``.stderr.

    Args:
        dies_at: number of the rename around which it is killed, 0 for none.
        file_bytes: files cannot become longer.
        changes: number of the change before which it is killed; 0 only counts them.
    """
    arguments = (str(model), str(out), options, dies_at, f"{out}.stderr", file_bytes, changes)
    child = CONTEXT.Process(target=_quantize, args=arguments)
    child.start()
    return child


def finish(model: Path, out: Path, dies_at: int = 0, **options: Any) -> int:
    """Exit code of such a child when it has ended."""
    child = start(model, out, dies_at, **options)
    child.join(120)
    assert child.exitcode is not None
    return int(child.exitcode)


def wait_until(condition: Callable[[], bool], child: Any) -> None:
    """Wait, for as long as the child lives, at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert child.is_alive(), "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stderr(out: Path) -> str:
    """What the children that wrote to ``out`` have printed."""
    return Path(f"{out}.stderr").read_text()
