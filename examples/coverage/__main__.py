"""Which MoE model classes of the installed transformers work, packed, in transformers and in vLLM.

    python examples/coverage --vllm .venv-vllm/bin/python    # all; without --vllm its side is left out
    python examples/coverage --only deepseek gpt_oss         # those whose type or class contains one of these
    python examples/coverage --write                         # keep the data, and the table in examples/docs

Every class is built with random weights in small sizes. The sides run in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import isolated
import table
from model_classes import moe_classes

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run the steps and print the table."""
    options = _parse()
    names = [f"{entry.model_type}/{entry.name}" for entry in moe_classes()]
    names = [n for n in names if not options.only or any(part.lower() in n.lower() for part in options.only)]
    entries = measure(names, options.folder, options.vllm)
    found = {"versions": table.versions(options.vllm), "classes": entries}
    if options.write:
        table.write(table.merged(json.loads(table.DATA.read_text(encoding="utf-8")), found))
    options.folder.joinpath("results.json").write_text(json.dumps(found, indent=1))
    print(table.markdown(found))


def measure(names: list[str], folder: Path, vllm: str | None) -> dict[str, dict[str, str]]:
    """Name -> step -> "yes" or why not."""
    lines = isolated.run(sys.executable, "transformers", folder, names)
    entries: dict[str, dict[str, Any]] = {name: dict(lines[name]["steps"]) for name in names}
    if vllm:
        saved = [name for name in names if (folder / name.replace("/", "-") / "reference.json").exists()]
        for name, line in isolated.run(vllm, "vllm", folder, saved).items():
            entries[name] |= line["steps"]
    return entries


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="parts of model types or class names")
    parser.add_argument("--vllm", help="Python of an environment with vLLM; without, that side is left out")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "coverage", help="for the models")
    parser.add_argument("--write", action="store_true", help="put data and table into examples/docs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
