"""What the options of ``bitsmoe compare`` change in what each method is asked to do."""

import os
import signal
import subprocess
import sys
import time
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


def test_too_little_text_to_tune_on_is_refused_before_any_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the number asked for and by the text that there is; quantizing takes as little."""
    monkeypatch.setattr(module, "in_process", lambda *_: pytest.fail("a method was run"))
    little = tmp_path / "little.txt"
    little.write_text("A few words. " * 300, encoding="utf-8")
    for given in (["--calibration-tokens", "4096"], ["--dataset", str(little)]):
        status, _, stderr = run_here(capfd, *COMMAND, "--methods", "full,bitsmoe", "--tune", "1", *given)
        assert status == 2
        assert "blocks of calibration text are too few to hold 0.0625 of them out" in stderr.splitlines()[-1]


SLOW = """
import os, sys, time
from pathlib import Path
from bitsmoe_plugin.commands.compare import method
from bitsmoe_plugin.base.interruption import deferred_interrupt

def run(name, task, scratch):
    (scratch / "layer").write_text("packed")
    with deferred_interrupt():  # as inside a layer
        Path({there!r}).write_text(f"{{scratch}} {{os.getpid()}} .")
        time.sleep(60)

method.run_method = run
sys.exit(method.main())
"""


@pytest.mark.parametrize("both", [True, False])
def test_ctrl_c_leaves_nothing_behind(both: bool, tmp_path: Path) -> None:
    """As from a terminal, to all processes, or to the method's alone; what a method has done so far is thrown
    away, without a word of going on."""
    there, slow = tmp_path / "there", tmp_path / "slow.py"
    slow.write_text(SLOW.format(there=str(there)))
    program = f"""
import sys
from bitsmoe_plugin.cli import main
from bitsmoe_plugin.commands.compare import method

run = method.subprocess.run
method.subprocess.run = lambda command, **options: run([command[0], {str(slow)!r}, *command[3:]], **options)
sys.exit(main({[*COMMAND, "--methods", "full"]!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (there.exists() and there.read_text().endswith(".")):
        assert process.poll() is None
        time.sleep(0.05)
    if both:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(int(there.read_text().split()[1]), signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "bitsmoe: interrupted; nothing was written"
    assert "Traceback" not in stderr
    assert "stopping when" not in stderr
    assert not Path(there.read_text().split()[0]).exists()
