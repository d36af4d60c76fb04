"""What the options of ``bitsmoe compare`` change in what each method is asked to do."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import run_here

from bitsmoe_plugin.commands.compare import compare as module
from bitsmoe_plugin.commands.compare.runners import RUNNERS
from bitsmoe_plugin.commands.compare.task import ComparisonTask

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = str(EXAMPLES / "data" / "eval.jsonl")
COMMAND = ["compare", str(EXAMPLES / "moe-tiny"), "--dataset", DATA, "--eval", DATA, "--json"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The task that a command line asks for."""
    tasks: list[ComparisonTask] = []
    monkeypatch.setattr(module, "compare", lambda task, *_, **__: tasks.append(task) or [])

    def ask(*given: str) -> ComparisonTask:
        status, _, stderr = run_here(capfd, *COMMAND, *given)
        assert status == 0, stderr
        return tasks.pop()

    return ask


def test_our_method_is_tuned_where_that_is_asked_for(asked: Any) -> None:
    """So that methods can be given the same time."""
    plain, tuned = asked(), asked("--tune", "3", "--tune-through", "layers")
    assert (plain.config().tune, plain.config().tune_through) == (0, "auto")
    assert (tuned.config().tune, tuned.config().tune_through) == (3, "layers")


@pytest.mark.parametrize(("given", "steps"), [((), "200"), (("--autoround-steps", "30"), "30")])
def test_autoround_takes_as_many_steps_as_are_asked_for(
    given: tuple[str, ...], steps: str, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = asked("--calibration-tokens", "2048", *given)
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        raise InterruptedError

    monkeypatch.setattr(subprocess, "run", run)
    for method in ("autoround", "autoround-all"):
        with pytest.raises(InterruptedError):
            RUNNERS[method](task, tmp_path)
        command = commands.pop()
        assert command[command.index("--iters") + 1] == steps
        assert ("--all-layers" in command) == (method == "autoround-all")
        assert "--no-sym" in command


def test_steps_of_autoround_are_checked_before_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _, stderr = run_here(capfd, *COMMAND, "--autoround-steps", "0")
    assert status == 2
    assert "--autoround-steps" in stderr.splitlines()[-1]
