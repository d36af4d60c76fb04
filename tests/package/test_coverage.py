"""The table of model classes in examples/docs/models.md: what worked still does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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


SERVED = tuple(name for name, steps in KNOWN.items() if _works(steps.get("served")))
AT_ONCE = 6


def _measure(folder: Path, names: tuple[str, ...], *options: str) -> dict[str, dict[str, Any]]:
    folder = Path(os.environ.get("BITSMOE_COVERAGE_FOLDER", folder))  # of results that may be there already
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
@pytest.mark.parametrize(
    "first", range(0, len(SERVED), AT_ONCE), ids=lambda first: SERVED[first].split("/")[0]
)
def test_all_classes_that_were_served_still_are(first: int, tmp_path: Path) -> None:
    """Two engines for each class that vLLM runs; some minutes for each part of the table."""
    names = SERVED[first : first + AT_ONCE]
    found = _measure(tmp_path, names, "--vllm", str(VLLM))
    assert not _lost(found, {name: KNOWN[name] for name in names}, SERVING)


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


def test_a_result_is_kept_as_long_as_it_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table was put together from runs with different versions, sources and sizes."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "coverage"))
    import kept
    from recipes import OVERRIDES

    name, versions = "mixtral/MixtralForCausalLM", {"transformers": {"torch": "1"}, "vllm": {"vllm": "2"}}
    (tmp_path / "mixtral-MixtralForCausalLM").mkdir()
    (tmp_path / "mixtral-MixtralForCausalLM" / "reference.json").touch()
    line = {"name": name, "steps": {"built": "yes", "generates": "yes"}, "seconds": 1.0}
    for side in versions:
        kept.Kept(tmp_path, side, versions).add(line)

    def sides(found: dict[str, Any] = versions) -> list[str]:
        return [side for side in versions if kept.Kept(tmp_path, side, found).found([name, "a/B"])]

    assert sides() == ["transformers", "vllm"]
    assert sides({**versions, "vllm": {"vllm": "3"}}) == ["transformers"]
    assert sides({**versions, "transformers": {"torch": "2"}}) == []  # vLLM's follows from it
    with monkeypatch.context() as changed:
        changed.setitem(OVERRIDES, "mixtral", {"num_local_experts": 8})
        assert sides() == []
        changed.setitem(OVERRIDES, "olmoe", {"num_experts": 8})
        changed.delitem(OVERRIDES, "mixtral")
        assert sides() == ["transformers", "vllm"]
    with monkeypatch.context() as changed:
        changed.setattr(kept, "_source", {"transformers": kept._source("transformers"), "vllm": ""}.get)
        assert sides() == ["transformers"]
    (tmp_path / "mixtral-MixtralForCausalLM" / "reference.json").unlink()
    assert sides() == ["vllm"]  # for which transformers' side would have to make the models again


@pytest.mark.parametrize(
    ("name", "tensors", "wanted"),
    [
        (
            "qwen3_vl_moe/A",
            {"l.0.mlp.experts.gate_up_proj": (4, 6, 2), "l.0.mlp.gate.weight": (4, 2)},
            {"l.0.mlp.experts.gate_up_proj": (4, 2, 6), "l.0.mlp.gate.weight": (4, 2)},
        ),
        (
            "longcat_flash/A",
            {f"l.0.mlp.experts.{i}.up_proj.weight": (3, 2) for i in (0, 3, 4, 11)},
            {f"l.0.mlp.experts.{i}.up_proj.weight": (3, 2) for i in (0, 3)},
        ),
    ],
)
def test_vllm_is_given_what_publishers_store(
    name: str,
    tensors: dict[str, Any],
    wanted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers saves these classes otherwise, and vLLM was said not to serve them unquantized."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "coverage"))
    from model_classes import ModelClass
    from published import as_published

    save_file({n: torch.rand(shape) for n, shape in tensors.items()}, tmp_path / "model.safetensors")
    config = SimpleNamespace(n_routed_experts=4)
    as_published(ModelClass(*name.split("/")), config, tmp_path, tmp_path)
    assert {n: tuple(t.shape) for n, t in load_file(tmp_path / "model.safetensors").items()} == wanted


def test_a_table_is_of_one_run() -> None:
    """Some classes, or one side, written over a table leave rows of other versions in it."""
    command = [sys.executable, str(ROOT / "examples" / "coverage"), "--write"]
    for options in ["--only", "mixtral", "--vllm", "python"], []:
        run = subprocess.run([*command, *options], capture_output=True, text=True)
        assert run.returncode == 2
        assert "--write is of all classes and both sides" in run.stderr


def test_what_fails_has_a_reason_in_words(monkeypatch) -> None:
    """Rows said what vLLM happened to raise, cut in the middle, and paths of the machine that ran it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "coverage"))
    from reasons import reason
    from table import failing

    assert reason("AssertionError: (cpu_router.py:239)").startswith("vLLM on a CPU has no router")
    refusal = "model type 'dbrx' cannot be quantized: its experts (DbrxExperts) are not stored so"
    assert reason(refusal) == refusal  # ours say it themselves
    texts = {name: " ".join(steps.values()) for name, steps in failing(KNOWN)}
    assert not [name for name, text in texts.items() if "/tmp/" in text or "Traceback" in text]
