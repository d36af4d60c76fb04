"""Runs the steps of some model classes, one after the other: ``worker.py SIDE FOLDER RESULTS TYPE/CLASS...``.

A line of JSON is appended to RESULTS for each class, so that what was found stays when one ends the process.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

from model_classes import ModelClass


def main() -> None:
    side, folder, results, *names = sys.argv[1:]
    steps = import_module({"transformers": "steps", "vllm": "serving"}[side]).steps
    for name in names:
        entry, started = ModelClass(*name.split("/")), time.monotonic()
        found = steps(entry, Path(folder) / entry.folder)
        line = {"name": name, "steps": found, "seconds": round(time.monotonic() - started, 1)}
        with Path(results).open("a") as file:
            print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
