"""``quantize --tune``: the same as quantizing and then tuning, in one call that can go on where it ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, ConfigError, QuantizationError
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands import estimate_resources, estimate_tuning, tuning_way
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.commands.quantize import quantize_to_directory
from bitsmoe_plugin.commands.times import read_times
from bitsmoe_plugin.integrations import tune_on_load
from bitsmoe_plugin.integrations.optimum import BitsMoEQuantizer
from bitsmoe_plugin.pipeline import descent_progress, tuning
from bitsmoe_plugin.pipeline.descent import Descent
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings

TEXT = str(Path(__file__).parents[2] / "examples" / "data" / "calibration.jsonl")
OPTIONS: dict[str, Any] = {"bits": 4.0, "method": "fast", "calibration_tokens": 1024, "sequence_length": 64}
FLAGS = ["--dataset", TEXT, "--calibration-tokens", "1024", "--sequence-length", "64"]


def test_it_is_quantizing_and_tuning_in_one(
    small_moe_tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; interrupted once all layers are tuned, and then within a step through the whole model, it
    goes on with what is finished."""
    whole, packed, tuned = (tmp_path / name for name in ("whole", "packed", "tuned"))
    config = BitsMoEConfig(dataset=TEXT, tune=1, **OPTIONS)

    step = Descent.step

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "tune", stopped)
        with pytest.raises(Interrupted, match="finished"):
            quantize_to_directory(str(small_moe_tiny), whole, config)
    assert not whole.exists()
    assert len(list(tmp_path.glob("whole.work/tuned-*.safetensors"))) >= 1
    calls = iter(range(9))
    with monkeypatch.context() as patched:
        patched.setattr(descent_progress, "SECONDS", 0.0)
        patched.setattr(Descent, "step", lambda *given: stopped() if next(calls) == 5 else step(*given))
        with pytest.raises(Interrupted, match="finished"):
            quantize_to_directory(str(small_moe_tiny), whole, config)
    assert len(list(tmp_path.glob("whole.work/gains-*.safetensors"))) == 1
    command = [
        "quantize",
        str(small_moe_tiny),
        str(whole),
        "--method",
        "fast",
        "--bits",
        "4",
        *FLAGS,
        "--tune",
        "1",
    ]
    with monkeypatch.context() as patched:  # what was begun goes on, though "auto" would not begin it now
        patched.setattr(tuning_way, "available_memory", lambda _: 10**6)
        assert run_here(capfd, *command)[0] == 0
    assert "tuning" in read_times(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    quantize_to_directory(str(small_moe_tiny), packed, BitsMoEConfig(dataset=TEXT, **OPTIONS))
    given = ["tune", str(packed), str(tuned), "--reference", str(small_moe_tiny), *FLAGS, "--epochs", "1"]
    status, _, said = run_here(capfd, *given)
    assert status == 0, said
    before, one, two = (load_file(path / "model.safetensors") for path in (packed, whole, tuned))
    assert all(one[name].equal(tensor) for name, tensor in two.items())
    assert not all(before[name].equal(tensor) for name, tensor in two.items())
    notes = [AutoModelForCausalLM.from_pretrained(p).config.quantization_config for p in (whole, tuned)]
    assert notes[0].to_dict() == notes[1].to_dict()
    assert notes[0].calibration["tuning"]["learnt"] == ["bases", "rows"]


def test_where_nothing_comes_closer_the_model_stays(
    small_moe_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = TuningSettings.of
    monkeypatch.setattr(TuningSettings, "of", lambda config: replace(planned(config), learning_rate=1.0))
    config = BitsMoEConfig(dataset=TEXT, tune=1, tune_through="model", **OPTIONS)
    with pytest.warns(UserWarning, match="tune=1: no epoch came closer"):
        model = AutoModelForCausalLM.from_pretrained(small_moe_tiny, quantization_config=config)
    assert "tuning" not in model.config.quantization_config.calibration


def test_what_cannot_be_tuned_is_refused_before_work(
    moe_tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in optimum, whose options are the same."""
    monkeypatch.setattr("bitsmoe_plugin.integrations.quantize_on_load.loaded_source", None)
    few = BitsMoEQuantizer.from_pretrained(moe_tiny_path)
    with pytest.raises(QuantizationError, match=r"4 blocks .* at least 16"):
        few.quantize(tmp_path / "out", dataset=TEXT, tune=1, **{**OPTIONS, "calibration_tokens": 256})
    with pytest.raises(ConfigError, match="tune=-1"):
        BitsMoEConfig(tune=-1)
    model = AutoModelForCausalLM.from_pretrained(moe_tiny_path)
    planned = tune_on_load.PlannedTuning.of
    config, blocks = BitsMoEConfig(tune=2), [{"pixel_values": None}]
    with pytest.raises(ConfigError, match="tune=2 is not possible with images"):
        planned(model, ["model.safetensors"], blocks, config, None)
    with pytest.raises(ConfigError, match="not loaded from files"):
        planned(model, None, blocks, config, None)
    with pytest.raises(ConfigError, match=r"several devices; leave tune out"):
        planned(model, ["model.safetensors"], blocks, config, {"model": "cuda:0", "lm_head": "cuda:1"})
    monkeypatch.setattr(Workers, "present", lambda: Workers(0, 2))
    with pytest.raises(ConfigError, match=r"several processes; leave tune out"):
        planned(model, ["model.safetensors"], blocks, config, None)
    assert planned(model, None, blocks, BitsMoEConfig(), None) is None


def test_estimate_tells_what_it_takes(moe_tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds in proportion to the epochs; all experts of the original in memory beside the packed ones, or
    those of one layer."""
    monkeypatch.setattr(estimate_resources, "_matmul_speed", lambda: 1e10)
    through = {"tune_through": "model"}
    none, two, four = (estimate(moe_tiny_path, BitsMoEConfig(tune=n, **through)).seconds for n in (0, 2, 4))
    assert none is not None
    assert two is not None
    assert four is not None
    assert four - none == pytest.approx(2 * (two - none))
    assert two > 1.2 * none
    tuning = estimate(moe_tiny_path, BitsMoEConfig(tune=2)).tuning
    assert tuning["model"]["seconds"] == pytest.approx(two - none)
    assert 0 < tuning["layers"]["seconds"] < 1.1 * tuning["model"]["seconds"]
    assert tuning["layers"]["memory_bytes"] < tuning["model"]["memory_bytes"]
    assert estimate(moe_tiny_path, BitsMoEConfig()).tuning == {}
    shapes = [LayerShape(64, 512, 256)] * 40
    work = estimate_resources.Workload(
        shapes, tokens=8192, experts_per_token=4, other_bytes=10**8, active_weights=5 * 10**7, itemsize=2
    )
    memory = estimate_resources.peak_memory(work, BitsMoEConfig(tune=1))
    weights = 40 * 64 * 3 * 512 * 256
    assert (memory["experts"], memory["packed"], memory["model"]) == (2 * weights, weights // 4, 2 * 10**8)
    memory = estimate_tuning.layers_memory(work, BitsMoEConfig(), 0, TuningSettings(through="layers"))
    assert (memory["experts"], memory["packed"], memory["model"]) == (
        weights // 20,
        weights // 160,
        2 * 10**8,
    )
    assert "packed" not in estimate_resources.peak_memory(work, BitsMoEConfig())


def test_the_way_is_an_option_of_the_command(
    moe_tiny_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards a flag that nobody reads."""
    given = ["quantize", str(moe_tiny_path), str(tmp_path / "out"), *FLAGS, "--tune", "1"]
    status, _, errors = run_here(capfd, *given, "--tune-through", "layer")
    assert status == 2
    assert "tune_through='layer' is not allowed; allowed: 'auto', 'layers', 'model', 'both'" in errors
