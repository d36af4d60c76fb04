"""What was found, as JSON and as a table in examples/docs/models.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from isolated import ROOT, torchvision_folders
from reasons import reason

DATA = ROOT / "examples" / "coverage" / "results.json"
PAGE = ROOT / "examples" / "docs" / "models.md"
START, END = "<!-- made by examples/coverage -->\n", "<!-- end -->\n"
STEPS = ("built", "accepted", "quantized", "reloaded", "generates")
SERVING = ("served unquantized", "served")
_LONGEST = 200
_PACKAGES = "torch", "transformers", "vllm", "torchvision"


def versions(vllm: str | None) -> dict[str, dict[str, str]]:
    """Side -> package -> version."""
    import torch
    import transformers

    found = {
        "transformers": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    }
    if vllm:
        code = "import importlib.metadata as m, json; "
        code += "v = {d.name: d.version for d in m.distributions()}; "
        code += f"print(json.dumps({{p: v[p] for p in {_PACKAGES} if p in v}}))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, torchvision_folders(vllm)))}
        command = [vllm, "-c", code]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found["vllm"] = json.loads(out.splitlines()[-1])
    return found


def write(found: dict[str, Any]) -> None:
    """Replace the data, and the table in the page."""
    DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    PAGE.write_text(before + START + markdown(found) + END + rest.partition(END)[2], encoding="utf-8")


def works(text: str | None) -> bool:
    """Whether a step was passed."""
    return text is not None and text.startswith("yes")


def markdown(found: dict[str, Any]) -> str:
    """Versions, counts, a row for each class, and what those that fail fail with."""
    classes: dict[str, dict[str, str]] = found["classes"]
    sides = "; ".join(", ".join(f"{p} {v}" for p, v in side.items()) for side in found["versions"].values())
    columns = (*STEPS, *SERVING)
    counts = ", ".join(f"{step} {sum(works(c.get(step)) for c in classes.values())}" for step in columns)
    lines = [f"Of {len(classes)} classes ({sides}): {counts}.", ""]
    lines += ["| model type | class | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for name, steps in classes.items():
        kind, _, model_class = name.partition("/")
        marks = " | ".join(_mark(steps.get(step)) for step in columns)
        lines.append(f"| {kind} | {model_class} | {marks} |")
    lines += [
        "",
        "What fails, and with what:",
        "",
        *(_reason(name, steps) for name, steps in failing(classes)),
        "",
    ]
    return "\n".join(lines)


def failing(classes: dict[str, dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """Classes that a step of theirs ended for."""
    return [(name, steps) for name, steps in classes.items() if _failed(steps)]


def _failed(steps: dict[str, str]) -> str | None:
    named = (*STEPS, *SERVING, "process")
    return next((step for step in named if step in steps and not works(steps[step])), None)


def _mark(text: str | None) -> str:
    if text is None:
        return ""
    if works(text):
        return "yes" + text.removeprefix("yes")
    return text if text.startswith("differs") else "no"


def _reason(name: str, steps: dict[str, str]) -> str:
    step = _failed(steps) or ""
    text = " ".join(reason(steps[step]).split()).replace(str(Path.home()), "~")
    return f"- {name}, {step}: {text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}"
