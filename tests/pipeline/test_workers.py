"""Several processes that quantize one model: bitwise what one process writes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resume_support
import torch
from workers_support import run_forked

from bitsmoe_plugin.base import worker_links
from bitsmoe_plugin.base.workers import ALONE, Workers, _portable
from bitsmoe_plugin.errors import QuantizationError

PROGRAM = Path(__file__).parents[1] / "support" / "workers_support.py"
EVERYONE = 10**6
"""Experts of a group, more than there are."""
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def dense(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer, then three of experts: more than are planned in one turn of two processes."""
    directory = tmp_path_factory.mktemp("dense")
    tiny_model("deepseek_v3", num_hidden_layers=4).bfloat16().save_pretrained(directory)
    return directory


def run(
    model: Path, out: Path, processes: int, groups_of: int = 1, dies_at: int = 0, *, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    """Quantize, in processes that are forked or, as users do, started by torchrun."""
    if not torchrun:
        return run_forked(model, out, processes, groups_of, dies_at)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, str(PROGRAM), str(model), str(out)]
    command += [str(groups_of), str(dies_at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def alone(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes, in groups of one expert."""
    out = tmp_path_factory.mktemp("alone") / "out"
    result = run(dense, out, 1)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def together(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in groups of all experts."""
    out = tmp_path_factory.mktemp("together") / "out"
    result = run(dense, out, 1, EVERYONE)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same_bytes(
    dense: Path, alone: Path, tmp_path: Path, processes: int
) -> None:
    """Three do not divide the number of layers, nor that of experts."""
    result = run(dense, tmp_path / "out", processes, torchrun=processes == 2)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "out") == files(alone)
    assert not (tmp_path / "out.work").exists()


def test_several_processes_choose_the_same_widths(tiny_model: Any, tmp_path: Path) -> None:
    """Of one size for the model, with a dense layer, shared experts and a head whose costs one of them alone
    measures; guards against layers that one process has in other bits than the rest."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 4}
    tiny_model("deepseek_v3", **sizes).bfloat16().save_pretrained(tmp_path / "model")
    for processes in (1, 2):
        result = run(tmp_path / "model", tmp_path / f"sized-{processes}", processes)
        assert result.returncode == 0, result.stderr
    assert files(tmp_path / "sized-2") == files(tmp_path / "sized-1")
    written = (tmp_path / "sized-2" / "config.json").read_text()
    assert "lm_head" in written.partition('"dense"')[2].partition('"ignore"')[0]


@pytest.mark.parametrize("renames", [6, 20])
def test_several_processes_continue_what_one_began(
    dense: Path, together: Path, tmp_path: Path, renames: int
) -> None:
    """Killed in the first and in the second pass: hidden states and packed layers reach all processes."""
    assert resume_support.finish(dense, tmp_path / "out", dies_at=renames) < 0
    assert bool(list((tmp_path / "out.work").glob("packed-*"))) == (renames == 20)
    result = run(dense, tmp_path / "out", 2, EVERYONE)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "out") == files(together)


@pytest.mark.parametrize("layer", [3, 7])
def test_a_worker_that_is_killed_loses_nothing(dense: Path, alone: Path, tmp_path: Path, layer: int) -> None:
    """In the first and in the second pass over four layers: no output, and the same command goes on."""
    result = run(dense, tmp_path / "out", 2, dies_at=layer, torchrun=layer == 3)
    assert result.returncode != 0
    assert not (tmp_path / "out").exists()
    assert bool(list((tmp_path / "out.work").glob("widths*"))) == (layer == 7)
    result = run(dense, tmp_path / "out", 2)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "out") == files(alone)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("turn", [2, 6])
def test_an_error_in_one_process_ends_all_with_its_reason(dense: Path, tmp_path: Path, turn: int) -> None:
    """In either pass. Guards against processes that wait for it until the time-out of the group."""
    result = run(dense, tmp_path / "out", 2, dies_at=-turn, torchrun=turn == 2)
    assert result.returncode != 0
    assert result.stderr.count(f"ValueError: the disk burns in turn {turn}") >= 2, result.stderr
    assert not (tmp_path / "out").exists()


def test_an_error_in_one_process_ends_another_in_the_middle_of_a_layer(dense: Path, tmp_path: Path) -> None:
    """The other would compute for ten minutes before they exchange anything. Nothing half-written is left."""
    result = run(dense, tmp_path / "endless", 2, dies_at=-6)
    assert result.returncode != 0
    assert "ToldError: worker 1 failed: ValueError: the disk burns in turn 6" in result.stderr, result.stderr
    assert not (tmp_path / "endless").exists()
    assert all(path.suffix != ".tmp" for path in (tmp_path / "endless.work").iterdir())


def watched(what: str, directory: Path) -> list[str]:
    """What the three processes of ``watch_support`` print."""
    command = [sys.executable, str(PROGRAM.with_name("watch_support.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    together = [
        subprocess.Popen([*command, str(rank), str(directory / "store"), what], env=environment, **PIPES)
        for rank in range(3)
    ]
    try:
        told = [process.communicate(timeout=200) for process in together]
    finally:
        for process in together:
            process.kill()
    dead = {"fail": None, "killed": 1, "first killed": 0}[what]
    # A survivor has said all by then; that its process group has no more peers can end its last breath.
    fine = {0} if dead is None else {0, -signal.SIGABRT}
    ends = [{-signal.SIGKILL} if rank == dead else fine for rank in range(3)]
    assert all(process.returncode in end for process, end in zip(together, ends, strict=True)), told
    return [line for out, _ in told for line in out.splitlines()]


def test_a_failure_interrupts_the_others_wherever_they_are(tmp_path: Path) -> None:
    """In Python, in a C library, where exceptions get lost, but not in the midst of a cleanup; in threads
    other than the main one at the next exchange. Guards against hours of work for nothing."""
    lines = watched("fail", tmp_path)
    ways = (
        "in_torch",
        "in_c",
        "in_sleep",
        "where_exceptions_get_lost",
        "while_it_cleans_up",
        "another",
        "thread",
    )
    for name in ways:
        assert f"1 {name} ValueError: the disk burns" in lines
        for rank in (0, 2):
            assert f"{rank} {name} ToldError: worker 1 failed: ValueError: the disk burns" in lines, lines
    assert {"0 cleaned up", "2 cleaned up"} <= set(lines)
    assert "1 our own ConfigError: the disk burns" in lines
    assert "0 our own ConfigError: worker 1 failed: the disk burns" in lines
    assert {"0 end well", "1 end well", "2 end well"} <= set(lines)


@pytest.mark.parametrize(("what", "dead"), [("killed", 1), ("first killed", 0)])
def test_a_worker_that_is_killed_is_missed_at_once(tmp_path: Path, what: str, dead: int) -> None:
    """It sends no message. While the others compute, or wait for it in an exchange."""
    text = f"worker {dead} ended without a word: it was killed, or its machine is gone"
    wanted = {f"{rank} killed QuantizationError: {text}" for rank in {0, 1, 2} - {dead}}
    assert set(watched(what, tmp_path)) == wanted


def test_workers_that_cannot_connect_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall between machines: errors are then met at the next exchange, as the warning says."""
    offered: list[Any] = []

    def gathered(own: Any, size: int) -> list[Any]:
        if isinstance(own, tuple):
            offered.append(own)
        return ["here", "there"] if isinstance(own, str) else [own] * size

    monkeypatch.setattr(worker_links, "gathered", gathered)
    monkeypatch.setattr(worker_links, "_SECONDS", 0.2)
    with pytest.warns(UserWarning, match="not all of 2 processes can connect to the first one"):
        assert worker_links.connect(0, 2) == {}
    assert len(offered) == 1


def test_strangers_are_no_workers() -> None:
    """Whoever does not know the word, or claims the first one's rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        callers = []
        for said in (b"wrong 1\n", b"word 0\n", b"word one\n", b"word 1\n"):
            callers.append(socket.create_connection(("127.0.0.1", port)))
            callers[-1].sendall(said)
        links = worker_links._accepted(server, "word", 2)
        assert list(links) == [1]
        assert links[1].getpeername() == callers[-1].getsockname()
        for link in (*callers, *links.values()):
            link.close()


def test_all_processes_take_fewer_blocks_when_one_has_too_little_memory(dense: Path, tmp_path: Path) -> None:
    """Guards against processes whose statistics differ: as with one process that has too little memory."""
    written = {}
    for processes in (1, 2):
        result = run(dense, tmp_path / str(processes) / "little", processes)
        assert result.returncode == 0, result.stderr
        assert "out of memory in decoder layer 1" in result.stderr
        written[processes] = files(tmp_path / str(processes) / "little")
    assert written[1] == written[2]


def test_an_error_that_cannot_be_sent_is_told_as_text() -> None:
    class Local(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} {second}")

    assert str(_portable(Local("no", "room"))) == "Local: no room"
    told = QuantizationError("layer 3")
    assert _portable(told) is told


def test_a_process_with_other_options_is_refused(dense: Path, tmp_path: Path) -> None:
    """Guards against a mixture of two quantizations. Nothing is written."""
    result = run(dense, tmp_path / "differ", 2)
    assert result.returncode != 0
    assert "process 1 of torch.distributed was given another model" in result.stderr
    assert not (tmp_path / "differ").exists()


def test_errors_of_the_first_process_reach_the_others(tmp_path: Path) -> None:
    """A bad output directory ends all of them, with the reason."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    result = run(tmp_path, tmp_path / "out", 2)
    assert result.returncode != 0
    assert "exists and is not empty" in result.stderr


def test_parts_are_taken_once() -> None:
    takers = [sum(Workers(rank, 3).takes(number) for rank in range(3)) for number in range(10)]
    assert takers == [1] * 10
    assert ALONE.main
    assert ALONE.takes(7)
    assert ALONE.merged({1: torch.ones(1)}) == {1: torch.ones(1)}
