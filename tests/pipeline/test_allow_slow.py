"""Without compiled kernels nothing is quantized unless that is asked for, at every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, ConfigError
from bitsmoe_plugin.codec import backends
from bitsmoe_plugin.codec.backends import native
from bitsmoe_plugin.commands.estimate_resources import Workload, rough_seconds
from bitsmoe_plugin.pipeline import quantize_model

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "moe-tiny"
TEXT = ROOT / "examples" / "data" / "calibration.jsonl"
SLOW = "without compiled kernels takes about 20 times as long: bitsmoe_plugin was found at .*--allow-slow"


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.parametrize(
    "command",
    [
        ["quantize", str(MODEL), "{out}", "--dataset", str(TEXT), "--device", "cpu"],
        ["compare", str(MODEL), "--dataset", str(TEXT), "--eval", str(TEXT)],
        ["bench", "quantize", "--shape", "moe-tiny", "--device", "cpu"],
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_at_once(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    status, _, err = run_here(capfd, *(part.replace("{out}", out) for part in command))
    assert status == 2
    assert "without compiled kernels" in err
    assert "--allow-slow" in err
    assert not list(tmp_path.iterdir())


def test_python_refuses_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BitsMoEConfig(dataset=str(TEXT))
    with pytest.raises(ConfigError, match=SLOW):
        AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ConfigError, match=SLOW):
        quantize_model(model, torch.zeros(2, 16, dtype=torch.int64), config)


def test_optimum_refuses(tmp_path: Path) -> None:
    optimum = pytest.importorskip("bitsmoe_plugin.integrations.optimum")
    quantizer = optimum.BitsMoEQuantizer.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match=SLOW):
        quantizer.quantize(tmp_path / "out", dataset=str(TEXT))


def test_asked_for_it_is_done(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    size = ("--shape", "moe-tiny", "--experts", "1", "--tokens", "64", "--bits", "8", "--gptq-experts", "0")
    status, _, err = run_here(capfd, "bench", "quantize", *size, "--device", "cpu", "--allow-slow")
    assert status == 0, err
    backends.refuse_slow("cpu", allowed=True)
    assert "allow_slow" not in BitsMoEConfig(allow_slow=True).to_dict()


def test_estimates_tell_the_time_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsmoe_plugin.codec.layout import LayerShape
    from bitsmoe_plugin.commands import estimate_resources

    given: dict[str, Any] = {"tokens": 1, "experts_per_token": 1, "other_bytes": 0, "itemsize": 2}
    work = Workload(shapes=[LayerShape(512, 2048, 768)], active_weights=0, **given)
    monkeypatch.setattr(estimate_resources, "_matmul_speed", lambda: 1e30)
    times = {}
    for name, library in (("with", object()), ("without", None)):
        monkeypatch.setattr(estimate_resources.native, "library", lambda library=library: library)
        times[name] = rough_seconds(work, BitsMoEConfig())
    assert times["without"] == pytest.approx(20 * times["with"])
