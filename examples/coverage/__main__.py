"""Which MoE model classes of the installed transformers work, packed, in transformers and in vLLM.

    python examples/coverage --vllm .venv-vllm/bin/python    # all; without --vllm its side is left out
    python examples/coverage --only deepseek gpt_oss         # those whose type or class contains one of these
    python examples/coverage --vllm ... --write              # all, then data and table in examples/docs

Every class is built with random weights in small sizes. The sides run in processes of their own. What was
found stays in --folder and is taken from there as long as versions, source of this project and the class's
small config are the same: a run can be interrupted, and be made in parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import isolated
import table
from isolated import torchvision_folders
from kept import Kept
from model_classes import moe_classes
from table import STEPS, works

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run the steps and print the table."""
    options = _parse()
    names = [f"{entry.model_type}/{entry.name}" for entry in moe_classes()]
    names = [n for n in names if not options.only or any(part.lower() in n.lower() for part in options.only)]
    entries, versions = measure(names, options.folder, options.vllm)
    found = {"versions": versions, "classes": entries}
    if options.write:
        table.write(found)
    options.folder.joinpath("results.json").write_text(json.dumps(found, indent=1))
    print(table.markdown(found))


def measure(names: list[str], folder: Path, vllm: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name -> step -> "yes" or why not; and the versions that this was found with."""
    known = table.versions(vllm)
    kept = Kept(folder, "transformers", known)
    lines = _lines(kept, names, sys.executable, "transformers", folder)
    entries: dict[str, dict[str, Any]] = {name: dict(lines[name]["steps"]) for name in names}
    if vllm:
        saved = [name for name in names if works(entries[name].get(STEPS[-1]))]
        kept = Kept(folder, "vllm", known)
        lines = _lines(kept, saved, vllm, "vllm", folder)
        for name in saved:
            entries[name] |= lines[name]["steps"]
    return entries, known


def _lines(kept: Kept, names: list[str], python: str, side: str, folder: Path) -> dict[str, isolated.Line]:
    found = kept.found(names)
    left = [name for name in names if name not in found]
    print(f"{side}: {len(left)} of {len(names)} classes to be measured", file=sys.stderr)
    path = torchvision_folders(python) if side == "vllm" else []
    return found | isolated.run(python, side, folder, left, kept.add, path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="parts of model types or class names")
    parser.add_argument("--vllm", help="Python of an environment with vLLM; without, that side is left out")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out" / "coverage", help="for models and what was found"
    )
    parser.add_argument("--write", action="store_true", help="put data and table into examples/docs")
    options = parser.parse_args()
    if options.write and (options.only or not options.vllm):
        parser.error("--write is of all classes and both sides: give --vllm, and no --only")
    return options


if __name__ == "__main__":
    main()
