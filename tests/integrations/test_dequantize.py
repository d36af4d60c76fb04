"""``bitsmoe dequantize`` and ``model.dequantize()``. All families: ``test_families_end_to_end``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from families_support import build, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.integrations import dequantize_checkpoint as command
from bitsmoe_plugin.models.families import read_experts
from bitsmoe_plugin.runtime import dispatch

IDS = torch.arange(5, 60)[None]
EXACT = 1e-5
"""Relative; sums of float32 in another order."""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS % model.config.vocab_size).logits  # type: ignore[no-any-return]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels round their inputs; what a layer stands for is what it computes without that."""
    monkeypatch.setattr(dispatch, "_on_cpu", lambda *_: (None, "this is a test"))


@pytest.mark.filterwarnings("ignore:packed experts on cpu run in plain torch")
def test_the_command_writes_what_the_packed_model_computes(
    packed_moe_tiny: Path, moe_tiny_path: Path, tmp_path: Path, capfd: Any, in_plain_torch: None
) -> None:
    out = tmp_path / "dense"
    status, _, printed = run_here(capfd, "dequantize", str(packed_moe_tiny), str(out), "--dtype", "float32")
    assert status == 0, printed
    assert "dense, 2" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    values = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in values
    assert values["dtype"] == "float32"
    names = [load_file(path / "model.safetensors").keys() for path in (moe_tiny_path, out)]
    assert names[0] == names[1]
    assert not (out / "README.md").exists()  # that of the packed model would be wrong
    assert AutoTokenizer.from_pretrained(out)("a b") == AutoTokenizer.from_pretrained(moe_tiny_path)("a b")
    packed = AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(out)
    assert dense.dtype == torch.float32
    wanted = logits(packed)
    assert distance(logits(dense), wanted) < EXACT
    assert distance(logits(packed.dequantize()), wanted) < EXACT
    assert not hasattr(packed, "hf_quantizer")


def test_files_are_bounded_and_indexed(packed_moe_tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With files of at most one layer."""
    command.dequantize_checkpoint(packed_moe_tiny, tmp_path / "whole")
    monkeypatch.setattr(command, "FILE_BYTES", 2**20)
    command.dequantize_checkpoint(packed_moe_tiny, tmp_path / "files")
    files = sorted(path.name for path in (tmp_path / "files").glob("*.safetensors"))
    assert len(files) > 4
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "files"))
    assert torch.equal(logits(whole), logits(parts))
    assert whole.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_kept_experts_are_what_they_were(tiny_model: Any, tmp_path: Path) -> None:
    dense = build(tiny_model, "qwen3_moe")
    dense.save_pretrained(tmp_path / "dense")
    packed = quantize(tmp_path / "dense", bits=16, super_experts={"model.layers.0.mlp.experts": [1, 2]})
    manifest = packed.config.quantization_config.layers
    packed.save_pretrained(tmp_path / "packed")
    assert manifest["model.layers.0.mlp.experts"]["kept_experts"] == [1, 2]
    command.dequantize_checkpoint(tmp_path / "packed", tmp_path / "again")
    for found in (packed.dequantize(), AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        wanted, now = (read_experts(m.model.layers[0].mlp.experts) for m in (dense, found))
        assert torch.equal(now.gate[[1, 2]], wanted.gate[[1, 2]])
        assert torch.equal(now.up[[1, 2]], wanted.up[[1, 2]])
        assert torch.equal(now.down[[1, 2]], wanted.down[[1, 2]])


def test_a_model_is_dequantized_in_the_dtype_that_is_asked_for(packed_moe_tiny: Path) -> None:
    """All of it, or products of two dtypes would fail; also after saving, which makes a text of the dtype."""
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny).dequantize(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.isfinite(logits(model)).all()
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny)
    model.config.dtype = "bfloat16"
    assert {parameter.dtype for parameter in model.dequantize().parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8 is no floating point type"):
        AutoModelForCausalLM.from_pretrained(packed_moe_tiny).dequantize(torch.int8)


def _flip(packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.3.mlp.experts.bitsmoe_payload"][0] ^= 1
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})


def _edit(packed: Path, **changes: Any) -> None:
    values = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**values, **changes}))


BAD = {
    "damaged": (_flip, "model.layers.3.mlp.experts: packed tensors do not match their SHA-256"),
    "layers": (lambda packed: _edit(packed, decoder_sparse_step=2), "config.json was altered"),
    "sizes": (lambda packed: _edit(packed, moe_intermediate_size=32), "config.json was altered"),
    "dtype": (lambda packed: _edit(packed, dtype=None), "has no dtype"),
    "no weights": (lambda packed: (packed / "model.safetensors").unlink(), "lacks safetensors files"),
    "not packed": (lambda packed: _edit(packed, quantization_config=None), "not a packed BitsMoE checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_and_nothing_is_left(
    case: str, packed_moe_tiny: Path, tmp_path: Path, capfd: Any
) -> None:
    change, message = BAD[case]
    shutil.copytree(packed_moe_tiny, tmp_path / "packed")
    change(tmp_path / "packed")
    status, _, printed = run_here(capfd, "dequantize", str(tmp_path / "packed"), str(tmp_path / "out"))
    assert status == 2
    assert message in printed
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_nothing_is_overwritten(packed_moe_tiny: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "file").touch()
    assert run_here(capfd, "dequantize", str(packed_moe_tiny), str(tmp_path))[0] == 2
    assert run_here(capfd, "dequantize", str(packed_moe_tiny), str(packed_moe_tiny))[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
