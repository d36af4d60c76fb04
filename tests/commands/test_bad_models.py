"""Models that cannot be used: one line and status 2 from every command, before it has worked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run_here
from transformers import AutoModelForCausalLM

from bitsmoe_plugin.commands.compare import compare as comparison

TEXT = str(Path(__file__).parents[2] / "examples" / "data" / "calibration.jsonl")
FEW = ("--dataset", TEXT, "--calibration-tokens", "256", "--sequence-length", "64")
DOORS: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "estimate": lambda model, out: ("estimate", model),
    "quantize": lambda model, out: ("quantize", model, out, *FEW),
    "evaluate": lambda model, out: ("evaluate", model, "--dataset", TEXT),
    "compare": lambda model, out: ("compare", model, *FEW, "--eval", TEXT, "--methods", "rtn"),
}


def _edited(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4MB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "type": (
        lambda folder: _edited(folder, model_type="nosuch", architectures=["NoSuch"]),
        "config.json cannot be used: transformers",
    ),
    "no type": (lambda folder: _edited(folder, model_type=None), "config.json"),
    "value": (lambda folder: _edited(folder, hidden_size="many"), "hidden_size"),
    "sizes": (
        lambda folder: _edited(folder, num_attention_heads=7, num_key_value_heads=7, head_dim=None),
        "'qwen3_moe' that transformers cannot make",
    ),
    "cut": (_cut, "model.safetensors cannot be read as safetensors (it is truncated: 5500716 of 11001432"),
    "cut shard": (_cut_shard, "model-00002-of-00004.safetensors cannot be read as safetensors (it is trunc"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has neither model.safetensors.index.json nor model.safetensors",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_every_command_says_the_same(
    bad: str,
    moe_tiny_path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against errors of libraries, which name no file, and processes that are started first."""
    monkeypatch.setattr(comparison, "in_process", lambda *_: pytest.fail("a method was run"))
    spoil, message = BAD[bad]
    folder = shutil.copytree(moe_tiny_path, tmp_path / "model")
    spoil(folder)
    for name, arguments in DOORS.items():
        if name == "estimate" and spoil in (_cut, _cut_shard):  # which needs no more than headers
            continue
        status, _, stderr = run_here(capfd, *arguments(str(folder), str(tmp_path / "out")))
        line = stderr.strip().splitlines()[-1]
        assert (status, line.startswith("bitsmoe: error: "), message in line) == (2, True, True), (name, line)
    assert not (tmp_path / "out").exists()


def test_a_reference_is_looked_at_before_the_model_is_measured(
    moe_tiny_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(moe_tiny_path, tmp_path / "model")
    _cut(folder)
    target = "bitsmoe_plugin.commands.evaluate.load_for_evaluation"
    monkeypatch.setattr(target, lambda *_: pytest.fail("the model was loaded"))
    arguments = ("evaluate", str(moe_tiny_path), "--dataset", TEXT, "--reference", str(folder))
    status, _, stderr = run_here(capfd, *arguments)
    assert (status, "it is truncated" in stderr) == (2, True), stderr
