"""The examples run as written, on a cut-down copy of the bundled model, and say what they must."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
CALIBRATION, EVALUATION = "examples/data/calibration.jsonl", "examples/data/eval.jsonl"
TORCHAO = Path(sys.prefix) / "torchao"
"""Where ``make install-torchao`` puts it: every process that finds it would import it, for seconds."""
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token")


@pytest.fixture(scope="module")
def gptq(small_moe_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its experts rounded to 4 bits and stored as GPTQModel does."""
    path = tmp_path_factory.mktemp("gptq")
    AutoTokenizer.from_pretrained(small_moe_tiny).save_pretrained(path)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(small_moe_tiny / "model.safetensors").items():
        if ".experts." not in name:
            stored[name] = tensor
            continue
        groups = tensor.float().T.unflatten(0, (-1, 32))  # [groups, 32, outputs]
        scales = groups.abs().amax(1) / 7
        codes = (groups / scales[:, None]).round().int() + 8
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        zeros = torch.full((len(scales), tensor.shape[0] // 8), -0x77777778, dtype=torch.int32)  # all 8
        parts = {
            "qweight": (codes.reshape(-1, 8, tensor.shape[0]) << shifts[:, None]).sum(1, dtype=torch.int32),
            "qzeros": zeros,
            "scales": scales.half(),
            "g_idx": torch.arange(tensor.shape[1], dtype=torch.int32) // 32,
        }
        stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    save_file(stored, path / "model.safetensors")
    config = json.loads((small_moe_tiny / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return path


def edited(name: str, folder: Path, **constants: Any) -> Path:
    """A copy of an example whose constants a user has changed."""
    source = (ROOT / "examples" / name).read_text()
    for constant, value in constants.items():
        text = repr(str(value) if isinstance(value, Path) else value)
        changed, count = re.subn(rf"^{constant} = [^#\n]*", f"{constant} = {text}  ", source, flags=re.M)
        assert count == 1, f"{name} has no line {constant} = ..."
        source = changed
    (folder / name).write_text(source)
    return folder / name


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script from the root of the repository, with arguments; returns what it printed."""

    def start(script: Path, *arguments: Any) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        capfd.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capfd.readouterr().out

    return start


def numbers(pattern: str, text: str) -> list[float]:
    """The groups of the only match."""
    (found,) = re.findall(pattern, text)
    return [float(number.replace(",", "")) for number in ([found] if isinstance(found, str) else found)]


def test_quickstart_and_8bit_attention(small_moe_tiny: Path, tmp_path: Path, run) -> None:
    """The second takes what the first saved; in a process of its own, which alone imports torchao."""
    changes = {
        "MODEL": small_moe_tiny,
        "OUT": tmp_path / "out",
        "CALIBRATION_TOKENS": 4096,
        "EVALUATION_TOKENS": 4000,
    }
    script = edited("quickstart.py", tmp_path, BITS=3.0, **changes)
    text = run(script)
    assert numbers(r"([\d.]+) bits per expert weight = ", text)[0] == pytest.approx(3, abs=0.01)
    before, after = numbers(r"perplexity ([\d.]+) -> ([\d.]+)", text)
    assert before < after < 1.2 * before
    assert "In the beginning there was" in text
    assert "the same logits" in text

    if importlib.util.find_spec("torchao") is None and not TORCHAO.is_dir():
        pytest.skip("torchao is not installed; run make install-torchao")
    script = edited("attention_8bit.py", tmp_path, PACKED=tmp_path / "out", EVALUATION_TOKENS=4000)
    paths = os.pathsep.join([str(TORCHAO), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    size, rounded = numbers(r"attention: ([\d,]+) -> ([\d,]+) bytes", done.stdout)
    assert 0.5 <= rounded / size < 0.53
    packed, mixed = numbers(r"perplexity: ([\d.]+) -> ([\d.]+)", done.stdout)
    assert packed == pytest.approx(after, rel=2e-3)
    assert mixed == pytest.approx(packed, rel=0.01)
    assert mixed != packed


def test_custom_budget(small_moe_tiny: Path, tmp_path: Path, run) -> None:
    """Each budget is what was asked for, and the total is the same."""
    changes = {
        "MODEL": small_moe_tiny,
        "OUT": tmp_path / "out",
        "CALIBRATION_TOKENS": 2048,
        "EVALUATION_TOKENS": 4000,
    }
    text = run(edited("custom_budget.py", tmp_path, **changes))
    assert "refused: bits=2 is too little beside layer_bits" in text
    bits = numbers(r"one budget: ([\d.]+) bits \(by layer ([\d.]+), [\d.]+; .* down ([\d.]+)\)", text)
    first = numbers(r"3 bits for .*: ([\d.]+) bits \(by layer ([\d.]+), [\d.]+; .* down [\d.]+\)", text)
    down = numbers(r"2.25 bits for .*: ([\d.]+) bits \(by layer .* down ([\d.]+)\)", text)
    assert [bits[0], first[0], down[0]] == pytest.approx([2, 2, 2], abs=1e-3)
    assert bits[1:] != pytest.approx([3, 2.25], abs=1e-2)
    assert [first[1], down[1]] == pytest.approx([3, 2.25], abs=1e-3)


def test_qwen3_end_to_end(small_moe_tiny: Path, tmp_path: Path, run) -> None:
    """Started twice: the second run finds the packed model."""
    options = [
        "--model",
        small_moe_tiny,
        "--out",
        tmp_path / "out",
        "--dataset",
        CALIBRATION,
        "--eval",
        EVALUATION,
    ]
    options += ["--calibration-tokens", 1024, "--eval-tokens", 2000]
    first, second = (run(ROOT / "examples" / "qwen3_30b_a3b.py", *options) for _ in range(2))
    for text in (first, second):
        assert "2 MoE layers, 16 experts" in text
        assert numbers(r"([\d.]+) bits per expert weight = ", text)[0] == pytest.approx(2, abs=1e-2)
        assert f"vllm serve {tmp_path / 'out'}" in text
    assert "is there already" in second
    assert "is there already" not in first
    assert numbers(r"perplexity ([\d.]+) on", first) == numbers(r"perplexity ([\d.]+) on", second)


def test_compare_with_a_gptq_checkpoint(small_moe_tiny: Path, gptq: Path, run) -> None:
    """BitsMoE gets the bits that the checkpoint takes: 4, and 16 + 4 for every 32 of its weights."""
    options = [
        "--model",
        small_moe_tiny,
        "--checkpoint",
        gptq,
        "--calibration-tokens",
        4096,
        "--eval-tokens",
        2000,
    ]
    text = run(ROOT / "examples" / "compare_with_gptq.py", *options)
    rows = {cells[0].strip(): cells for line in text.splitlines() if len(cells := line.split("│")[1:-1]) > 5}
    bits = {method: float(cells[1]) for method, cells in rows.items()}
    assert bits == pytest.approx({"full": 16, "checkpoint": 4.625, "bitsmoe": 4.625}, abs=2e-3)
    divergence = {method: float(cells[-3]) for method, cells in rows.items()}
    assert divergence["full"] == 0 < divergence["bitsmoe"] < divergence["checkpoint"] < 0.1


def test_reproduce_paper(small_moe_tiny: Path, gptq: Path, tmp_path: Path, run, monkeypatch) -> None:
    """The layout of the table, with a task of two lines; 8 experts' bases take 4, 2.125 and 0.75 bits."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"text": "In the beginning there was", "right": "the word", "wrong": "zxq"}] * 2
    (tmp_path / "task.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(f"""
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/task.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    options = ["--dataset", CALIBRATION, "--gptq", gptq, "--out", tmp_path / "out", "--factor-bits", 3]
    options += ["--calibration-tokens", 1024, "--tasks", "words", "--task-dir", tmp_path / "tasks"]
    text = run(ROOT / "examples" / "reproduce_paper.py", small_moe_tiny, *options)
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == ["method", "bits", "words", "average", "hours"]
    assert [row[0] for row in table[1:]] == ["full", "GPTQ", "paper-v1", "paper-v2", "default"]
    assert [float(row[1]) for row in table[1:]] == pytest.approx([16, 4.625, 7, 5.125, 3.75], abs=1e-2)
    assert all(row[2:4] == ["100.00", "100.00"] for row in table[1:])


def test_add_a_family(run) -> None:
    """What follows the convention works, what deviates is refused, and works with its entry."""
    text = run(ROOT / "examples" / "add_a_family.py")
    assert text.count("SquareReluForCausalLM at 3 bits, loaded again") == 2
    assert "refused: model.layers.0.mlp.experts (TransposedExperts, model type 'square_relu_moe')" in text
