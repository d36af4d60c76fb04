"""The table of model classes in examples/docs/models.md: what worked still does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = json.loads((ROOT / "examples" / "coverage" / "results.json").read_text(encoding="utf-8"))["classes"]
QUICK = (
    "axk1/AXK1ForCausalLM",  # group-limited routing
    "deepseek_v4/DeepseekV4ForCausalLM",  # several residual streams
    "gemma4_text/Gemma4ForCausalLM",
    "lfm2_moe/Lfm2MoeForCausalLM",  # two kinds of layers
    "nemotron_h/NemotronHForCausalLM",  # no gate
    "glm_moe_dsa/GlmMoeDsaForCausalLM",  # layers return indices for later ones
    "qwen3_omni_moe_thinker/Qwen3OmniMoeThinkerForConditionalGeneration",  # filled by blocks
    "switch_transformers/SwitchTransformersForConditionalGeneration",  # refused
)
STEPS = ("built", "accepted", "quantized", "reloaded", "generates")
SERVING = ("served unquantized", "served")
VLLM = Path(os.environ.get("BITSMOE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))


def _works(text: str | None) -> bool:
    return text is not None and text.startswith("yes")


def _measure(folder: Path, names: tuple[str, ...], *options: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(ROOT / "examples" / "coverage"), "--folder", str(folder), *options]
    run = subprocess.run([*command, "--only", *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads((folder / "results.json").read_text())["classes"]


def _lost(
    found: dict[str, dict[str, Any]], known: dict[str, dict[str, Any]], wanted: tuple[str, ...] = STEPS
) -> list[str]:
    return [
        f"{name}, {step}: {found[name].get(step) or found[name]}"
        for name, steps in known.items()
        for step in wanted
        if _works(steps.get(step)) and not _works(found[name].get(step))
    ]


def test_classes_that_worked_still_do(tmp_path: Path) -> None:
    """A kind of class each; guards the table, and the command that makes it."""
    found = _measure(tmp_path, QUICK)
    assert found.keys() == set(QUICK)
    assert not _lost(found, {name: KNOWN[name] for name in QUICK})
    assert all(_works(found[name]["generates"]) for name in QUICK[:-1])
    assert "cannot be quantized" in found[QUICK[-1]]["accepted"]


@pytest.mark.exhaustive
def test_all_classes_that_worked_still_do(tmp_path: Path) -> None:
    """Those of a newer transformers that the table lacks need a new table: examples/coverage --write."""
    found = _measure(tmp_path, ("/",))
    assert found.keys() == KNOWN.keys()
    assert not _lost(found, KNOWN)


@pytest.mark.exhaustive
@pytest.mark.skipif(not VLLM.exists(), reason="needs an environment with vLLM (make install-vllm)")
def test_all_classes_that_were_served_still_are(tmp_path: Path) -> None:
    """Two engines for each class that vLLM runs; about an hour on two cores."""
    served = {name: steps for name, steps in KNOWN.items() if _works(steps.get("served"))}
    found = _measure(tmp_path, tuple(served), "--vllm", str(VLLM))
    assert not _lost(found, served, SERVING)


def test_a_class_that_ends_its_process_does_not_end_the_table(tmp_path: Path, monkeypatch) -> None:
    """Its row says so, and the classes after it are measured."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "coverage"))
    import isolated

    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "for name in sys.argv[4:]:\n"
        "    if name == 'b/B': os._exit(7)\n"
        "    print(json.dumps({'name': name, 'steps': {'built': 'yes'}}), file=open(sys.argv[3], 'a'))\n"
    )
    monkeypatch.setattr(isolated, "__file__", str(tmp_path / "isolated.py"))
    found = isolated.run(sys.executable, "transformers", tmp_path / "out", ["a/A", "b/B", "c/C"])
    assert found["b/B"]["steps"] == {"process": "ends its process (exit status 7)"}
    assert found["a/A"]["steps"] == found["c/C"]["steps"] == {"built": "yes"}
