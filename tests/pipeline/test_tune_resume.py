"""Tuning through the whole model that ends early: it goes on where it was, with the same result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import QuantizationError
from bitsmoe_plugin.base import work_directory
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.work_directory import WorkDirectory, locked
from bitsmoe_plugin.commands import tuning_way
from bitsmoe_plugin.commands.quantize import quantize_to_directory
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.expert_source import LoadedExperts
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.pipeline import descent_progress, tune_scales, tuning
from bitsmoe_plugin.pipeline.descent import Descent
from bitsmoe_plugin.pipeline.descent_progress import Best, DescentProgress
from bitsmoe_plugin.pipeline.run_identity import pass_identity
from bitsmoe_plugin.pipeline.tune_layers import Original
from bitsmoe_plugin.pipeline.tune_scales import Tuning, tune
from bitsmoe_plugin.pipeline.tuning import tune_by
from bitsmoe_plugin.pipeline.tuning_settings import LEARNABLE, TuningSettings

TEXT = str(Path(__file__).parents[2] / "examples" / "data" / "calibration.jsonl")
SETTINGS = TuningSettings(
    epochs=2, batch_size=2, held_out=0.25, learning_rate=5e-3, learn=LEARNABLE, through="model"
)
"""Of eight blocks six are learnt from: three steps in each of two epochs."""


@pytest.fixture(scope="module")
def reference(small_moe_tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_moe_tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def packed(packed_small: Path) -> Any:
    """Tests change copies."""
    return AutoModelForCausalLM.from_pretrained(packed_small, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text(reference: Any) -> Tensor:
    """What the unquantized model itself finds likely."""
    start = torch.randint(0, 4096, (8, 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return reference.generate(start, do_sample=True, max_new_tokens=47, min_new_tokens=47, pad_token_id=0)


def tuned(
    model: Any,
    reference: Any,
    text: Tensor,
    path: Path,
    settings: TuningSettings = SETTINGS,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Any, Tuning]:
    """A copy of a packed model, tuned, and what came of it."""
    model = copy.deepcopy(model)
    with locked(path):
        identity = pass_identity(model, reference, text, settings)
        progress = DescentProgress(WorkDirectory(path), identity, "model", stop)
        return model, tune(model, reference, text, settings, progress)


@pytest.fixture(scope="module")
def whole(packed: Any, reference: Any, text: Tensor) -> Any:
    """Tuned without interruption, and without a directory."""
    model = copy.deepcopy(packed)
    return model, tune(model, reference, text, SETTINGS)


def assert_same(found: tuple[nn.Module, Tuning], wanted: tuple[nn.Module, Tuning]) -> None:
    """Bitwise."""
    assert found[1] == wanted[1]
    state = wanted[0].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found[0].state_dict().items())


@contextmanager
def killed_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> Iterator[None]:
    """Within a call of a function, counted from 0; saves are due before every step."""
    function, calls = getattr(owner, name), iter(range(99))

    def dies(*args: Any) -> Any:
        if next(calls) == call:
            raise RuntimeError("killed")
        return function(*args)

    with monkeypatch.context() as patched:
        patched.setattr(descent_progress, "SECONDS", 0.0)
        patched.setattr(descent_progress, "_TIMES", 0)
        patched.setattr(owner, name, dies)
        with pytest.raises(RuntimeError, match="killed"):
            yield


@pytest.mark.parametrize("after", [0, 3, 5])
def test_stopped_it_goes_on_with_the_same_result(
    packed: Any, whole: Any, reference: Any, text: Tensor, tmp_path: Path, after: int
) -> None:
    """Before the first step, between epochs and within one."""
    asked = iter(range(9))
    with pytest.raises(Interrupted, match=rf"after {after} of 6 steps .* Start the same again"):
        tuned(packed, reference, text, tmp_path, stop=lambda: next(asked) == after)
    steps: list[Any] = []
    found = tuned(packed, reference, text, tmp_path, stop=lambda: bool(steps.append(0)))
    assert len(steps) == 6 - after
    assert_same(found, whole)
    again = tuned(packed, reference, text, tmp_path, stop=lambda: True)  # all is finished
    assert_same(again, whole)


def test_killed_again_and_again_it_goes_on(
    packed: Any, whole: Any, reference: Any, text: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within steps, where an epoch's end is measured, and within the save after it, of which nothing counts
    then; no more files are left than those of one save."""
    assert whole[1].epoch == 2  # so there are two that were best
    held = WorkDirectory.commit
    for owner, name, call in (
        (Descent, "step", 2),
        (tune_scales, "_held_out", 0),  # at the start it is not measured any more
        (WorkDirectory, "commit", 2),
        (Descent, "step", 1),
    ):
        model = copy.deepcopy(packed)
        with killed_in(monkeypatch, owner, name, call):
            tuned(model, reference, text, tmp_path)
    assert WorkDirectory.commit is held
    with locked(tmp_path):
        directory = WorkDirectory(tmp_path)
    state = directory.state["descent"]
    left = {f"{kind}-{state['saves']}" for kind in ("gains", "counts", "means", "squares")}
    left.add(f"best-{state['best']['epoch']}")
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == left
    assert_same(tuned(packed, reference, text, tmp_path), whole)


def test_a_failure_leaves_the_model_as_it_was(
    packed: Any, reference: Any, text: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that had gone on from steps of an earlier run."""
    model = copy.deepcopy(packed)
    for _ in range(2):
        with killed_in(monkeypatch, Descent, "step", 1), locked(tmp_path):
            identity = pass_identity(model, reference, text, SETTINGS)
            tune(
                model, reference, text, SETTINGS, DescentProgress(WorkDirectory(tmp_path), identity, "model")
            )
    state = packed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_steps_of_another_run_are_refused(packed: Any, reference: Any, text: Tensor, tmp_path: Path) -> None:
    """By what differs: settings, text, the packed model and the original, of which every weight counts."""
    asked = iter(range(9))
    with pytest.raises(Interrupted):
        tuned(packed, reference, text, tmp_path, stop=lambda: next(asked) == 1)
    other = TuningSettings(**{**vars(SETTINGS), "learning_rate": 1e-3})
    with pytest.raises(QuantizationError, match=r"tuning of another run: settings learning_rate was 0\.005"):
        tuned(packed, reference, text, tmp_path, other)
    with pytest.raises(QuantizationError, match="tuning of another run: calibration tokens"):
        tuned(packed, reference, text.flip(0), tmp_path)
    changed, original = copy.deepcopy(packed), copy.deepcopy(reference)
    changed.model.norm.weight.data[3] += 1
    original.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] += 1
    with pytest.raises(QuantizationError, match="tuning of another run: packed model was"):
        tuned(changed, reference, text, tmp_path)
    with pytest.raises(QuantizationError, match="tuning of another run: original was"):
        tuned(packed, original, text, tmp_path)


def test_ways_are_not_mixed(packed: Any, text: Tensor, tmp_path: Path) -> None:
    """Before anything is loaded: steps of one way would be lost in the other."""

    def loads() -> Any:
        raise AssertionError

    for state, was, now in (
        ({"descent": {"through": "both"}}, "both", "layers"),
        ({"descent": {"through": "model"}, "tuning": {}}, "model", "both"),
        ({"tuning": {}}, "layers", "model"),
    ):
        with locked(tmp_path):
            directory = WorkDirectory(tmp_path)
            directory.state = state
            settings = TuningSettings(**{**vars(SETTINGS), "through": now})
            with pytest.raises(QuantizationError, match=f"through was {was}, is {now}"):
                tune_by(settings, packed, text, original=loads, reference=loads, directory=directory)


@pytest.mark.parametrize(("begun", "way"), [(None, "layers"), ("both", "both"), ("model", "layers")])
def test_with_less_memory_the_way_stays(
    begun: str | None, way: str, small_moe_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards "auto" against steps that are kept: it would refuse them once less memory is free."""
    monkeypatch.setattr(tuning_way, "available_memory", lambda _: 10**6)
    original, config = ModelSource(str(small_moe_tiny)).config(), BitsMoEConfig(sequence_length=64)
    given = TuningSettings(), original, config, 512, "cpu", begun
    assert tuning_way.settled(*given).through == way


def test_what_is_saved_is_not_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards the peak of memory: files are written from the tensors that are learnt and from Adam's own."""
    gain = torch.zeros(64, requires_grad=True)
    layer, weights = (
        type("L", (), {"scale_gains": [gain], "code_gains": []})(),
        tune_scales.TunableWeights([]),
    )
    descent = Descent([layer], weights, SETTINGS, per_epoch=3)  # type: ignore[list-item]
    descent.step((gain - 1).square().sum())
    written: list[int] = []

    def watched(tensors: dict[str, Tensor], *args: Any, **options: Any) -> None:
        written.extend(tensor.data_ptr() for tensor in tensors.values())
        save_file(tensors, *args, **options)

    monkeypatch.setattr(work_directory, "save_file", watched)
    best = Best(0, 1.0, 1.0, descent.gains())
    with locked(tmp_path):
        DescentProgress(WorkDirectory(tmp_path), {}, "model").save(descent, best)
    adam = descent._optimizer.state[gain]
    own = [gain, adam["step"], adam["exp_avg"], adam["exp_avg_sq"], *best.gains]
    assert written == [tensor.data_ptr() for tensor in own]


def test_both_ways_go_on(packed: Any, reference: Any, text: Tensor, tmp_path: Path) -> None:
    """Stopped between the two, and then within the second: the result is that of both without a stop."""
    settings = TuningSettings(
        **{**vars(SETTINGS), "through": "both", "epochs": 1, "learn": ("bases", "rows")}
    )

    def run(path: Path, failure: BaseException | None = None) -> tuple[Any, Tuning]:
        model = copy.deepcopy(packed)

        def original() -> Original:
            return Original(reference, LoadedExperts(reference))

        def loads() -> Any:
            if failure is not None:
                raise failure
            return reference

        with locked(path):
            directory = WorkDirectory(path)
            return model, tune_by(
                settings, model, text, original=original, reference=loads, directory=directory
            )

    wanted = run(tmp_path / "whole")
    assert wanted[1].through == "both"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", KeyboardInterrupt())
    measured, asked = tuning.deferred_interrupt, iter(range(99))

    @contextmanager
    def stops(piece: str = "layer") -> Iterator[Callable[[], bool]]:
        with measured(piece) as stop:
            yield (lambda: next(asked) == 2) if piece == "step" else stop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "deferred_interrupt", stops)
        with pytest.raises(Interrupted, match="after 2 of 3 steps"):
            run(tmp_path / "cut")
    assert_same(run(tmp_path / "cut"), wanted)


FLAGS = ["--dataset", TEXT, "--calibration-tokens", "512", "--sequence-length", "64"]


def test_the_commands_go_on(
    packed_small: Path,
    small_moe_tiny: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted at once (twice Ctrl-C) they say where to go on; the same again writes the same bytes as in
    one go, and nothing else is left. What was tuned is not taken for a quantization."""
    rate = ["--held-out", "0.25", "--learning-rate", "0.005", "--epochs", "2", "--through", "model"]
    one, two = tmp_path / "one", tmp_path / "two"
    given = ["tune", str(packed_small), "OUT", "--reference", str(small_moe_tiny), *FLAGS, *rate]
    calls = iter(range(99))

    def stopped(*args: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    step = Descent.step
    with monkeypatch.context() as patched:
        patched.setattr(descent_progress, "SECONDS", 0.0)
        patched.setattr(descent_progress, "_TIMES", 0)
        patched.setattr(Descent, "step", stopped)
        status, _, errors = run_here(capfd, *(str(one) if word == "OUT" else word for word in given))
    assert status != 0
    assert "one.work holds what is finished. Start the same again" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["one.work"]
    with pytest.raises(QuantizationError, match=r"one\.work: it holds layers .* being tuned"):
        quantize_to_directory(str(small_moe_tiny), one, BitsMoEConfig(dataset=TEXT))
    for out in (one, two):
        status, _, errors = run_here(capfd, *(str(out) if word == "OUT" else word for word in given))
        assert status == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
