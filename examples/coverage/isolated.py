"""Runs a worker over model classes so that one class that ends the process does not end the table."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
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


def run(python: str, side: str, folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> line of the worker (see ``worker.py``); of one that ended it ``{"steps": {"process": why}}``.

    Args:
        python: interpreter of the environment.
        side: "transformers" or "vllm".
        folder: where models are written.
        names: ``model_type/class``.
    """
    found: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left:
        lines, end = _run_once(python, side, folder, left)
        found |= {line["name"]: line for line in lines}
        done = [line["name"] for line in lines]
        left = [name for name in left if name not in done]
        if left and end:
            found[left[0]] = {"name": left[0], "steps": {"process": end}, "seconds": SECONDS}
            left = left[1:]
    return found


def _run_once(python: str, side: str, folder: Path, names: list[str]) -> tuple[list[dict[str, Any]], str]:
    worker = str(Path(__file__).with_name("worker.py"))
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        results, log = Path(scratch) / "results.jsonl", folder / f"{side}.log"
        command = [python, worker, side, str(folder), str(results), *names]
        with log.open("a") as output:
            end = _wait(command, environment, results, output)
        text = results.read_text() if results.exists() else ""
        return [json.loads(line) for line in text.splitlines()], end


def _wait(command: list[str], environment: dict[str, str], results: Path, output: Any) -> str:
    """Until the process ends, or writes no line for too long: why it ended, "" if it should."""
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    size = 0
    try:
        while True:
            try:
                code = process.wait(timeout=SECONDS)
                return "" if code == 0 else f"ends its process (exit status {code})"
            except subprocess.TimeoutExpired:
                now = results.stat().st_size if results.exists() else 0
                if now == size:
                    return f"takes more than {SECONDS} seconds"
                size = now
    finally:
        process.kill()
        process.wait()
