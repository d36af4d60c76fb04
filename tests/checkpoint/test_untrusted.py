"""Packed checkpoints that others wrote: everything that can be wrong is refused by name, by every reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fuzz_checkpoint import OTHER, SAME, fuzz
from transformers import AutoModelForCausalLM
from untrusted_cases import CASES, EMBEDDING, edit, rewrite, tensors

from bitsmoe_plugin.cli import main
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.errors import BitsMoEError


def test_the_sound_checkpoint_is_accepted(sound: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Else every case below would pass for the wrong reason."""
    model = AutoModelForCausalLM.from_pretrained(sound)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert main(["inspect", str(sound)]) == 0
    assert "bits per expert weight" in capfd.readouterr().out


# Found by transformers itself before it asks us, with errors of its own.
_BEFORE_US = {"index without map", "code of its own"}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case: str, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By commands, before they load a model, and by transformers: with one line that tells what is wrong."""
    change, message = CASES[case]
    change(copy)
    data = tmp_path / "text.txt"
    data.write_text("text")
    capfd.readouterr()
    assert main(["inspect", str(copy)]) == 2
    error = capfd.readouterr().err.strip()
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    with pytest.raises((OSError, IndexError, ValueError) if case in _BEFORE_US else BitsMoEError):
        AutoModelForCausalLM.from_pretrained(copy)
    assert main(["report", str(copy), "--out", str(tmp_path / "report")]) == 2
    assert main(["evaluate", str(copy), "--dataset", str(data)]) == 2


COMMANDS = (
    "inspect DIR",
    "report DIR",
    "evaluate DIR --dataset text.txt",
    "estimate DIR",
    "quantize DIR DIR/../new --dataset text.txt",
    "write DIR DIR/../new.jsonl --dataset text.txt --tokens 512",
    "dequantize DIR DIR/../new",
    "import-upstream DIR DIR/../new",
    "compare DIR --dataset text.txt --eval text.txt",
    "bench decode DIR",
)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ' * 50_000, '{"a": 1, "a": 2}'])
def test_a_config_that_is_none_is_refused_by_commands(
    text: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(copy.parent)
    Path("text.txt").write_text("text")
    (copy / "config.json").write_text(text)
    for command in COMMANDS:
        assert main([part.replace("DIR", str(copy)) for part in command.split()]) == 2
        assert "config.json cannot be read" in capfd.readouterr().err, command
    assert not copy.with_name("new").exists()


def test_commands_that_load_models_check_them_first(
    copy: Path, moe_tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards those that load in processes of their own, and `quantize`, which would write a copy."""
    monkeypatch.chdir(copy.parent)
    Path("text.txt").write_text("text")
    assert main(["quantize", str(copy), f"{copy}/new", "--dataset", "text.txt"]) == 2
    assert "quantized already (quant_method 'bitsmoe')" in capfd.readouterr().err
    CASES["truncated file"][0](copy)
    compare = [
        "compare",
        str(moe_tiny_path),
        "--dataset",
        "text.txt",
        "--eval",
        "text.txt",
        "--methods",
        "full,checkpoint",
    ]
    for command in (
        [*compare, "--checkpoint", str(copy)],
        ["bench", "decode", str(moe_tiny_path), str(copy)],
    ):
        assert main(command) == 2
        error = capfd.readouterr().err.strip()
        assert "as safetensors" in error
        assert len(error.splitlines()) == 1


def test_a_model_of_other_shapes_is_refused_by_transformers(copy: Path) -> None:
    """transformers takes any shape while there is a quantizer; ids would then index beyond the rows."""
    tensors(copy, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:8].clone()}))
    with pytest.raises(BitsMoEError, match=r"embed_tokens\.weight is \(8, 32\)"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_model_far_larger_than_its_files_is_refused(copy: Path) -> None:
    """A missing tensor is made up by transformers, in the size that config.json asks for."""
    rewrite(copy, lambda tensors: [tensors.pop(name) for name in (EMBEDDING, "lm_head.weight")])
    edit(copy, lambda values: values["quantization_config"].pop("other_tensors"))
    edit(copy, lambda values: values.update(vocab_size=2**23))
    with pytest.raises(BitsMoEError, match="values besides its experts"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_the_links_of_the_hub_cache_are_followed(copy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in copy.iterdir():
        file.rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert inspect_checkpoint(snapshot)["bits_per_weight"] > 0
    AutoModelForCausalLM.from_pretrained(snapshot)


def test_altered_checkpoints_by_the_thousand() -> None:
    """The long run is ``python tests/support/fuzz_checkpoint.py``; this is its first seconds."""
    counts, failures = fuzz(0, 1500, seconds=10)
    assert not failures
    assert sum(counts.values()) > 300
    assert {result for _, result in counts} == {SAME, OTHER, "CheckpointError", "ConfigError"}


FORBIDDEN = (
    r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|marshal|shelve)\b",
    r"torch\.load\(",
    r"allow_pickle\s*=\s*True",
    r"trust_remote_code\s*=\s*True",
    r"(?<![\w.])(eval|exec)\(",
    r"yaml\.(unsafe_)?load\(",
)


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_source_of_ours_runs_what_it_reads(pattern: str) -> None:
    root = Path(__file__).parents[2]
    sources = [path for folder in ("bitsmoe_plugin", "vllm_ext") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 80
    assert not [str(path) for path in sources if re.search(pattern, path.read_text(), re.MULTILINE)]
