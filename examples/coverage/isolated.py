"""Runs a worker over model classes so that one class that ends the process does not end the table."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of all workers; what is set already stays."""
SECONDS = 1200
"""That one class may take, loading included."""
_POLL = 1.0
_OPERATORS = ROOT / "tests" / "support" / "torchvision_operators"
Line = dict[str, Any]
"""Of the worker, see ``worker.py``."""


def run(
    python: str,
    side: str,
    folder: Path,
    names: Sequence[str],
    keep: Callable[[Line], None] = lambda _: None,
    python_path: Sequence[Path] = (),
) -> dict[str, Line]:
    """Name -> line of the worker; of one that ended it ``{"steps": {"process": why}}``.

    Args:
        python: interpreter of the environment.
        side: "transformers" or "vllm".
        folder: where models are written.
        names: ``model_type/class``.
        keep: is given each line as soon as it is there.
        python_path: folders with further packages.
    """
    found: dict[str, Line] = {}
    left = list(names)
    environment = {**ENVIRONMENT, **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, *python_path)))

    def add(line: Line) -> None:
        found[line["name"]] = line
        keep(line)

    while left:
        end = _run_once([python, side, str(folder), *left], environment, add)
        left = [name for name in left if name not in found]
        if left and end:
            add({"name": left[0], "steps": {"process": end}, "seconds": SECONDS})
            left = left[1:]
    return found


def torchvision_folders(python: str) -> list[Path]:
    """What vLLM's environment needs on its path for classes with images, if ``make install-torchvision`` put
    it there."""
    folder = Path(python).absolute().parents[1] / "torchvision"
    return [folder, _OPERATORS] if folder.is_dir() else []


def _run_once(arguments: list[str], environment: dict[str, str], add: Callable[[Line], None]) -> str:
    python, side, folder, *names = arguments
    worker = str(Path(__file__).with_name("worker.py"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (Path(folder) / f"{side}.log").open("a") as output:
        results = Path(scratch) / "results.jsonl"
        command = [python, worker, side, folder, str(results), *names]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            return _wait(process, results, add)
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], results: Path, add: Callable[[Line], None]) -> str:
    """Until the process ends, or writes no line for too long: why it ended, "" if it should."""
    done, last, code = 0, time.monotonic(), None
    while code is None:
        try:
            code = process.wait(timeout=_POLL)
        except subprocess.TimeoutExpired:
            if time.monotonic() > last + SECONDS:
                return f"takes more than {SECONDS} seconds"
        lines = results.read_text().splitlines(keepends=True) if results.exists() else []
        for line in lines[done:]:
            if line.endswith("\n"):
                add(json.loads(line))
                done, last = done + 1, time.monotonic()
    return "" if code == 0 else f"ends its process (exit status {code})"
