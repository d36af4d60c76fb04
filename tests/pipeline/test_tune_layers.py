"""Tuning layer by layer: what it gains and leaves, that it goes on where it ended, what chooses it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from low_precision import fp8
from multimodal_support import build
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, ConfigError, QuantizationError
from bitsmoe_plugin.base import free_memory
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.work_directory import WorkDirectory, locked
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.calibration.blocks import held_out_last
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.commands import tuning_way
from bitsmoe_plugin.commands.evaluate import EvaluationText, evaluate_model
from bitsmoe_plugin.commands.quantize import quantize_to_directory
from bitsmoe_plugin.commands.tune import tune_to_directory
from bitsmoe_plugin.models.expert_source import LoadedExperts
from bitsmoe_plugin.models.families import read_experts
from bitsmoe_plugin.models.model_class import auto_class, load_model
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.streamed_experts import StreamedExperts
from bitsmoe_plugin.models.streamed_model import load_streamed
from bitsmoe_plugin.pipeline import layer_descent, quantize_model, tuning_streams
from bitsmoe_plugin.pipeline.tune_layers import Original, tune_layers
from bitsmoe_plugin.pipeline.tune_scales import Tuning
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*calibration token",
    "ignore:attention and the rest",
    "ignore:dense_bits leaves",
    "ignore:.*no epoch came closer",
)
TEXT = str(Path(__file__).parents[2] / "examples" / "data" / "calibration.jsonl")
SETTINGS = TuningSettings(epochs=1, batch_size=4, held_out=0.25, learning_rate=5e-3, through="layers")


def tuned(
    packed: Any,
    reference: Any,
    blocks: Tensor,
    path: Path,
    settings: TuningSettings = SETTINGS,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Any, Tuning]:
    """A copy of a packed model, tuned, and what came of it."""
    model = copy.deepcopy(packed)
    original = reference if isinstance(reference, Original) else Original(reference, LoadedExperts(reference))
    with locked(path):
        return model, tune_layers(model, original, blocks, settings, WorkDirectory(path), stop)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Bitwise."""
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    """Names of tensors that differ."""
    state = other.state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}


@pytest.fixture(scope="module")
def whole(packed: Any, moe_tiny: Any, blocks: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tuned without interruption."""
    return tuned(packed, moe_tiny, blocks, tmp_path_factory.mktemp("whole"))


def test_it_comes_closer_and_says_how_much(packed: Any, whole: Any, moe_tiny: Any, blocks: Tensor) -> None:
    """On blocks that it did not learn from, as ``evaluate`` measures them; scales alone move."""
    model, result = whole
    ordered, seen = held_out_last(blocks, 0.25)
    texts = [EvaluationText("held out", ordered[seen:])]
    before, after = (evaluate_model(m, texts, reference=moe_tiny).kl_divergence for m in (packed, model))
    assert (result.tokens, result.epoch, result.through) == (12 * 48, 1, "layers")
    assert after < 0.98 * before
    assert result.before == pytest.approx(before, rel=0.05)
    assert result.after == pytest.approx(after, rel=0.05)
    found = changed(model, packed)
    assert {name.rpartition(".")[2] for name in found} == {
        "bitsmoe_input_scales",
        "bitsmoe_output_scales",
        "bitsmoe_row_codes",
    }
    noted = model.config.quantization_config
    assert noted.calibration["tuning"] == {**result.noted()}
    assert "tuning" not in packed.config.quantization_config.calibration
    layers = packed.config.quantization_config.layers
    assert all(noted.layers[name]["sha256"] != entry["sha256"] for name, entry in layers.items())
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())


@pytest.mark.parametrize("after", [0, 3])
def test_stopped_it_goes_on_with_the_same_result(
    packed: Any, whole: Any, moe_tiny: Any, blocks: Tensor, tmp_path: Path, after: int
) -> None:
    """At a layer's edge; until then the model is as it was. Hidden states that nobody needs are gone."""
    asked = iter(range(9))
    with pytest.raises(Interrupted, match=f"after {after} of 4 layers"):
        tuned(packed, moe_tiny, blocks, tmp_path, stop=lambda: next(asked) == after)
    left = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert left == sorted(
        [f"{name}-{after}-{chunk}.safetensors" for name in ("exact", "hidden") for chunk in (0, 1)]
        + [f"untuned-{after}-1.safetensors"]
        + [f"tuned-{layer}.safetensors" for layer in range(after)]
    )
    model, result = tuned(packed, moe_tiny, blocks, tmp_path)
    assert result == whole[1]
    assert_same(model, whole[0])
    assert_same(tuned(packed, moe_tiny, blocks, tmp_path)[0], model)  # all is finished


def test_codes_that_are_learnt_are_kept_and_come_back(
    packed: Any, moe_tiny: Any, blocks: Tensor, tmp_path: Path
) -> None:
    """Guards against layers that go on with the codes that they had: payloads are kept only if codes move."""
    settings = replace(SETTINGS, learn=("bases", "rows", "codes"), learning_rate=1e-2)
    whole, result = tuned(packed, moe_tiny, blocks, tmp_path / "whole", settings)
    assert result.epoch
    assert {name.rpartition(".")[2] for name in changed(whole, packed)} >= {"bitsmoe_payload"}
    asked = iter(range(9))
    with pytest.raises(Interrupted):
        tuned(packed, moe_tiny, blocks, tmp_path / "parts", settings, stop=lambda: next(asked) == 2)
    assert "payload" in load_file(tmp_path / "parts" / "tuned-0.safetensors")
    assert_same(tuned(packed, moe_tiny, blocks, tmp_path / "parts", settings)[0], whole)


def test_killed_within_a_layer_it_goes_on(
    packed: Any, whole: Any, moe_tiny: Any, blocks: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against what is half done being taken for finished; the model is as it was meanwhile."""
    learn, calls = layer_descent.LayerDescent.run, iter(range(9))

    def dies(self: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("killed")
        return learn(self)

    model = copy.deepcopy(packed)
    with monkeypatch.context() as patched, locked(tmp_path):
        patched.setattr(layer_descent.LayerDescent, "run", dies)
        original = Original(moe_tiny, LoadedExperts(moe_tiny))
        with pytest.raises(RuntimeError, match="killed"):
            tune_layers(model, original, blocks, SETTINGS, WorkDirectory(tmp_path))
    assert changed(model, packed) == set()
    assert_same(tuned(packed, moe_tiny, blocks, tmp_path)[0], whole[0])


def test_work_of_another_run_is_refused(packed: Any, moe_tiny: Any, blocks: Tensor, tmp_path: Path) -> None:
    asked = iter(range(9))
    with pytest.raises(Interrupted):
        tuned(packed, moe_tiny, blocks, tmp_path, stop=lambda: next(asked) == 1)
    other = TuningSettings(**{**vars(SETTINGS), "learning_rate": 1e-3})
    with pytest.raises(QuantizationError, match=r"settings learning_rate was 0\.005, is 0\.001"):
        tuned(packed, moe_tiny, blocks, tmp_path, other)
    with pytest.raises(QuantizationError, match="tuning of another run: calibration tokens"):
        tuned(packed, moe_tiny, blocks[1:], tmp_path)


def test_chunks_and_streamed_experts_change_nothing(
    packed: Any, blocks: Tensor, moe_tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the original, one layer's experts are in memory at a time, and each is read once; with the order of
    the steps the chunks are another matter, so there is one here, and several pass through the layers."""
    model, source = load_streamed(ModelSource(str(moe_tiny_path)), torch.float32)
    assert isinstance(source, StreamedExperts)
    read: list[str] = []
    load = StreamedExperts._load

    def watched(self: StreamedExperts, layer: Any) -> None:
        assert not [n for n, _ in model.named_parameters() if ".experts." in n]
        load(self, layer)
        read.append(layer.name)

    monkeypatch.setattr(StreamedExperts, "_load", watched)
    monkeypatch.setattr(tuning_streams, "CHUNK", 4 * 48)
    found, result = tuned(packed, Original(model, source), blocks, tmp_path)
    assert read == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    assert result.after < result.before
    loaded = AutoModelForCausalLM.from_pretrained(moe_tiny_path, dtype=torch.float32).eval()
    again, same = tuned(packed, loaded, blocks, tmp_path / "again")
    assert same == result
    assert_same(found, again)


def test_a_rate_that_ruins_layers_is_not_taken(
    packed: Any, moe_tiny: Any, blocks: Tensor, tmp_path: Path
) -> None:
    settings = TuningSettings(**{**vars(SETTINGS), "learning_rate": 1.0, "learn": ("bases", "norms")})
    model, result = tuned(packed, moe_tiny, blocks, tmp_path, settings)
    assert (result.epoch, result.after) == (0, result.before)
    assert_same(model, packed)
    assert "tuning" not in model.config.quantization_config.calibration


def test_little_memory_is_remembered_and_too_little_said(
    packed: Any, moe_tiny: Any, blocks: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes without gradients a layer gets fewer blocks at once, also in the run that goes on, which then
    computes the same; in a step there is nothing to be made smaller."""
    part = LayerwiseForward._run_part
    most: list[int] = []

    def cramped(self: Any, index: int, call: Any, hidden: Tensor, *args: Any) -> Any:
        most.append(len(hidden))
        if index == 1 and len(hidden) > 2 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("pretended")
        return part(self, index, call, hidden, *args)

    monkeypatch.setattr(LayerwiseForward, "_run_part", cramped)
    with pytest.warns(UserWarning, match="2 instead of 4"):
        whole = tuned(packed, moe_tiny, blocks, tmp_path / "whole")[0]
    asked = iter(range(9))
    with pytest.warns(UserWarning, match="2 instead of 4"), pytest.raises(Interrupted):
        tuned(packed, moe_tiny, blocks, tmp_path / "cut", stop=lambda: next(asked) == 2)
    most.clear()
    assert_same(tuned(packed, moe_tiny, blocks, tmp_path / "cut")[0], whole)
    assert max(most) == 2

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(LayerwiseForward, "through", full)
    monkeypatch.setattr(layer_descent.LayerDescent, "_held", lambda _: 1.0)
    with pytest.raises(QuantizationError, match=r"4 blocks of 48 tokens at decoder layer 0; use a smaller"):
        tuned(packed, moe_tiny, blocks, tmp_path / "full")


@pytest.mark.parametrize(("learn", "ending"), [("norms", "norm.weight"), ("routers", "mlp.gate.weight")])
def test_norms_and_routers_are_learnt_in_their_layers(
    packed: Any, moe_tiny: Any, blocks: Tensor, tmp_path: Path, learn: str, ending: str
) -> None:
    """And kept like scales; the last norm belongs to no layer."""
    settings = TuningSettings(**{**vars(SETTINGS), "learn": (learn,), "layers_at_once": 2})
    model, result = tuned(packed, moe_tiny, blocks, tmp_path, settings)
    assert result.epoch == 1
    found = changed(model, packed)
    assert found
    assert all(name.endswith(ending) and ".layers." in name for name in found)
    assert_same(tuned(packed, moe_tiny, blocks, tmp_path, settings)[0], model)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"num_hidden_layers": 3}),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}),
        pytest.param("qwen3_next", {"num_hidden_layers": 2}, marks=pytest.mark.exhaustive),
    ],
)
def test_layers_of_other_forms(family: str, changes: Any, tiny_model: Any, tmp_path: Path) -> None:
    """Dense layers and shared experts; biases, and experts that were kept; linear attention."""
    reference = tiny_model(family, **changes)
    for name, parameter in reference.named_parameters():
        if "experts" in name and name.endswith("_bias"):
            parameter.data.normal_()
    tokens = torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    layer = LoadedExperts(reference).layers[-1].name
    config = BitsMoEConfig(bits=14, sequence_length=32, basis_group_size=16, super_experts={layer: [1]})
    packed = copy.deepcopy(reference)
    packed.config.quantization_config = quantize_model(packed, tokens, config)
    settings = TuningSettings(**{**vars(SETTINGS), "layers_at_once": 2})  # a dense layer with one of experts
    model, result = tuned(packed, reference, tokens, tmp_path, settings)
    assert_same(tuned(packed, reference, tokens, tmp_path, settings)[0], model)
    assert result.after <= result.before
    assert bool(changed(model, packed)) == bool(result.epoch)
    assert any(path.name.startswith("tuned-") for path in tmp_path.iterdir())


def test_the_way_follows_the_memory(
    moe_tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is said, with both sizes; where it is forced, it is taken."""
    config, original = BitsMoEConfig(sequence_length=512), ModelSource(str(moe_tiny_path)).config()

    def way(through: str, free: int | None) -> str:
        monkeypatch.setattr(tuning_way, "available_memory", lambda _: free)
        settings = TuningSettings(through=through)
        return tuning_way.settled(settings, original, config, 4096, "cpu").through

    assert [way("auto", free) for free in (10**10, 4 * 10**8, None)] == ["both", "layers", "both"]
    text = capsys.readouterr().err
    assert "layer by layer, then through the whole model: about" in text
    assert "400.000 MB are free, the whole model would take" in text
    assert [way(through, 10**6) for through in ("model", "both", "layers")] == ["model", "both", "layers"]


def test_free_memory_is_that_of_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers allow less than the machine has; pages of files that nobody uses are free."""
    machine = free_memory.available_memory()
    assert machine is not None
    assert machine > 10**7
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    for path, text in zip(files, ("5000000\n", "3000000\n", "anon 1\ninactive_file 1000000\n"), strict=True):
        Path(path).write_text(text)
    monkeypatch.setattr(free_memory, "_GROUPS", (files,))
    assert free_memory.available_memory() == 3_000_000
    (tmp_path / "max").write_text("max\n")
    assert free_memory.available_memory() > 10**7


FLAGS = ["--dataset", TEXT, "--calibration-tokens", "1024", "--sequence-length", "64", "--epochs", "1"]
FLAGS += ["--held-out", "0.25", "--batch-size", "2"]


def test_the_command_goes_on(
    packed_moe_tiny: Path,
    moe_tiny_path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed by Ctrl-C within the second layer: OUT is absent, what is finished stays and is said, and the
    same command writes what it would have written, in the packed model's size; nothing else is left."""
    learn, calls = layer_descent.LayerDescent.run, iter(range(9))

    def stopped(self: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return learn(self)

    one, two = tmp_path / "one", tmp_path / "two"
    given = ["--reference", str(moe_tiny_path), *FLAGS, "--through", "layers", "--layers-at-once", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(layer_descent.LayerDescent, "run", stopped)
        status, _, errors = run_here(capfd, "tune", str(packed_moe_tiny), str(one), *given)
    assert status != 0
    assert "one.work holds what is finished" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["one.work"]
    for out in (one, two):
        status, _, errors = run_here(capfd, "tune", str(packed_moe_tiny), str(out), *given)
        assert status == 0, errors
        assert "tuning layer by layer: about" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    sizes = [(path / "model.safetensors").stat().st_size for path in (one, packed_moe_tiny)]
    assert sizes[0] == sizes[1]
    before, after = (load_file(path / "model.safetensors") for path in (packed_moe_tiny, one))
    assert before.keys() == after.keys()
    loaded = AutoModelForCausalLM.from_pretrained(one)  # verifies hashes
    assert loaded.config.quantization_config.calibration["tuning"]["through"] == "layers"


def test_work_of_quantizing_and_of_tuning_is_told_apart(
    packed_moe_tiny: Path, moe_tiny_path: Path, tmp_path: Path
) -> None:
    """Guards the layers that either has finished when both are to write the same directory."""
    out, work = tmp_path / "out", tmp_path / "out.work"
    given = str(packed_moe_tiny), str(moe_tiny_path), out, TEXT, SETTINGS
    tune = partial(tune_to_directory, *given, calibration_tokens=2048, sequence_length=128)
    quantize = partial(quantize_to_directory, str(moe_tiny_path), out, BitsMoEConfig(dataset=TEXT))
    for name, other, start in (("identity", "quantized", tune), ("tuning", "tuned", quantize)):
        with locked(work):
            directory = WorkDirectory(work)
            directory.state[name] = {"blocks": []}
            directory.write("widths.safetensors", {"0": torch.zeros(1)})
            directory.commit()
        with pytest.raises(QuantizationError, match=rf"out\.work: it holds layers .* being {other}"):
            start()
        assert (work / "widths.safetensors").exists()
        shutil.rmtree(work)


@pytest.mark.parametrize("connected", [True, False])
def test_several_processes_are_refused(
    connected: bool,
    packed_moe_tiny: Path,
    moe_tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that torchrun started are not connected yet: they found one another's work directory in use."""
    if connected:
        monkeypatch.setattr(Workers, "present", lambda: Workers(0, 2))
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        tune_to_directory(
            str(packed_moe_tiny),
            str(moe_tiny_path),
            tmp_path / "out",
            TEXT,
            SETTINGS,
            calibration_tokens=2048,
            sequence_length=128,
        )


def test_originals_in_low_precision_and_with_other_parts(tiny_model: Any, tmp_path: Path) -> None:
    """Experts that are decoded as they are read, layers in 8 bits, and a model that sees images: in the call
    that quantizes, too. What is read layer by layer is what the model is when it is loaded whole."""
    tiny_model("deepseek_v3", num_hidden_layers=3, kv_lora_rank=16).bfloat16().save_pretrained(tmp_path / "a")
    fp8(tmp_path / "a", tmp_path / "fp8")
    build("qwen3_vl_moe").save_pretrained(tmp_path / "images")
    tokens = torch.randint(10, 64, (16, 32), generator=torch.Generator().manual_seed(1)).tolist()
    options = {"bits": 8, "method": "fast", "basis_group_size": 16, "dense_bits": 8, "held_out": 0.25}
    options |= {"dataset": tokens, "sequence_length": 32, "tune": 2, "tune_through": "layers"}
    for name in ("fp8", "images"):
        path = tmp_path / name
        model, source = load_streamed(ModelSource(str(path)))
        whole = load_model(path)
        for layer, stored in zip(source.layers, LoadedExperts(whole).layers, strict=True):
            with source.loaded(layer) as weights:
                wanted = read_experts(stored.module)
                assert all(torch.equal(tensor, vars(wanted)[part]) for part, tensor in vars(weights).items())
        assert changed(model, whole) == set()
        config = BitsMoEConfig(work_dir=tmp_path / f"{name}-work", **options)
        packed = auto_class(ModelSource(str(path)).config()).from_pretrained(path, quantization_config=config)
        with locked(config.work_dir):
            blocks = WorkDirectory(config.work_dir).state["tuning"]["blocks"]
        assert [block["layers"] for block in blocks] == [[0], [1], [2]]
        assert any(block["after"] < block["before"] for block in blocks)
        packed.save_pretrained(tmp_path / f"{name}-packed")
        loaded = load_model(tmp_path / f"{name}-packed")
        assert changed(loaded, packed) == set()
