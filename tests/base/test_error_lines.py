"""Every error of a command is one line that names what was worked on; a traceback only with --debug."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here

from bitsmoe_plugin import cli
from bitsmoe_plugin.base import error_lines
from bitsmoe_plugin.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "moe-tiny"
EVAL = str(EXAMPLES / "data" / "eval.jsonl")
FAST = ["--calibration-tokens", "2048", "--method", "fast"]


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink() or (model / name).write_bytes(content)  # type: ignore[func-returns-value]


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


BROKEN: dict[str, tuple[Callable[[Path], None], list[str], int, list[str]]] = {
    "weights cut": (cut, ["evaluate", "write"], 2, ["MODEL/model.safetensors cannot be read", "truncated"]),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        ["evaluate"],
        2,
        ["MODEL has neither", "nor model.safetensors"],
    ),
    "config is no JSON": (
        write("config.json", b"{no"),
        ["evaluate", "quantize", "compare", "reference", "write"],
        2,
        ["MODEL/config.json cannot be read"],
    ),
    "config is a list": (write("config.json", b"[1]"), ["evaluate", "quantize", "tune"], 2, ["holds a list"]),
    "no config": (
        lambda m: (m / "config.json").unlink(),
        ["evaluate", "quantize", "reference"],
        2,
        ["MODEL has no config.json"],
    ),
    "unknown family": (
        change_config(model_type="zzz"),
        ["quantize", "evaluate", "write"],
        2,
        ["MODEL/config.json cannot be used", "no model type 'zzz'"],
    ),
    "code of its own": (
        change_config(model_type="zzz", auto_map={"AutoConfig": "x.Y"}),
        ["evaluate", "reference"],
        2,
        ["MODEL is of model_type 'zzz'", "is not run"],
    ),
    "word for a number": (
        change_config(hidden_size="big"),
        ["quantize"],
        2,
        ["MODEL/config.json cannot be used", "'hidden_size'", "'big'"],
    ),
    "activation": (
        change_config(hidden_act="zzz"),
        ["evaluate", "quantize"],
        2,
        ["config.json of MODEL describes", "KeyError: 'zzz'"],
    ),
    "no heads": (
        change_config(num_attention_heads=0),
        ["evaluate", "write"],
        2,
        ["config.json of MODEL describes", "ZeroDivisionError"],
    ),
    "dtype": (change_config(dtype="float99"), ["quantize"], 1, ["MODEL: AttributeError: ", "float99"]),
    "tokenizer": (
        write("tokenizer.json", b'{"version": 3}'),
        ["evaluate", "write"],
        1,
        ["tokenizer of MODEL: KeyError"],
    ),
    "tokenizer's options": (
        write("tokenizer_config.json", b"{no"),
        ["evaluate"],
        1,
        ["tokenizer of MODEL: JSONDecodeError"],
    ),
    "no vocabulary": (
        lambda m: (m / "tokenizer.json").unlink(),
        ["evaluate"],
        1,
        ["tokenizer of MODEL: ValueError"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_one_line_that_names_it(
    case: str, packed_moe_tiny: Path, tmp_path: Path, capfd
) -> None:
    """Each was a traceback of 30 to 100 lines, or named something else."""
    breaks, names, status, parts = BROKEN[case]
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    breaks(model)
    out, packed = str(tmp_path / "out"), str(packed_moe_tiny)
    commands = {
        "evaluate": ["evaluate", str(model), "--dataset", EVAL],
        "quantize": ["quantize", str(model), out, "--dataset", EVAL, *FAST],
        "tune": ["tune", packed, out, "--reference", str(model), "--dataset", EVAL, *FAST[:2]],
        "reference": [
            "evaluate",
            packed,
            "--dataset",
            EVAL,
            "--reference",
            str(model),
            "--max-tokens",
            "9000",
        ],
        "compare": ["compare", str(model), "--dataset", EVAL, "--eval", EVAL, "--methods", "full"],
        "write": ["write", str(model), f"{out}.jsonl", "--dataset", EVAL, "--tokens", "512"],
    }
    for name in names:
        found, stdout, stderr = run_here(capfd, *commands[name])
        line = stderr.splitlines()[-1]
        assert (found, stdout, line.startswith("bitsmoe: error: ")) == (status, "", True), stderr
        assert all(part.replace("MODEL", str(model)) in line for part in parts), line
        assert "Traceback" not in stderr
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "P", "--dataset", EVAL, "--max-tokens", "-5"],
            "--max-tokens: '-5' is no whole number of at least 1",
        ),
        (["evaluate", "P", "--dataset", EVAL, "--batch-size", "0"], "--batch-size: '0' is no whole number"),
        (["evaluate", "P", "--dataset", EVAL, "--sequence-length", "1"], "sequence_length=1 is not allowed"),
        (["evaluate", "P", "--tasks", "arc_easy", "--few-shot", "-1"], "--few-shot: '-1' is no whole number"),
        (["evaluate", "P", "--tasks", "arc_easy", "--limit", "0"], "--limit: '0' is no"),
        (
            ["tune", "P", "O", "--reference", "M", "--dataset", EVAL, "--sequence-length", "0"],
            "sequence_length=0",
        ),
        (["quantize", "M", "O", "--dataset", EVAL, "--option", "tokenizer=3"], "tokenizer=3 is not allowed"),
        (
            ["compare", "M", "--dataset", EVAL, "--eval", EVAL, "--group-size", "0"],
            "--group-size: '0' is no whole number",
        ),
        (
            ["compare", "M", "--dataset", EVAL, "--eval", EVAL, "--new-tokens", "-1"],
            "--new-tokens: '-1' is no whole number",
        ),
        (
            ["compare", "M", "--dataset", EVAL, "--eval", EVAL, "--batch-size", "0"],
            "batch_size=0 is not allowed",
        ),
        (["report", "P", "--evaluation", "DEEP"], "cannot be read as JSON"),
    ],
)
def test_absurd_numbers_are_refused_by_name(
    arguments: list[str], message: str, packed_moe_tiny: Path, tmp_path: Path, capfd
) -> None:
    """They went through to torch's "shape is invalid", a division by zero, or a run on nothing."""
    (tmp_path / "deep.json").write_text("[" * 100_000)
    places = {"P": packed_moe_tiny, "M": MODEL, "O": tmp_path / "out", "DEEP": tmp_path / "deep.json"}
    status, _, stderr = run_here(capfd, *(str(places.get(a, a)) for a in arguments))
    assert status == 2
    assert message in stderr.splitlines()[-1]


def raising(error: BaseException) -> Callable[..., None]:
    def run(*args: Any, **options: Any) -> None:
        raise error

    return run


class Panic(BaseException):
    """As libraries in Rust raise them."""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("first\n\n  second"), 1, "inspect M: ValueError: first second (--debug shows where)"),
        (
            OSError(28, "No space left", "/x"),
            1,
            "inspect M: OSError: [Errno 28] No space left: '/x' (--debug",
        ),
        (MemoryError(), 1, "inspect M: MemoryError (--debug"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            1,
            "OutOfMemoryError: CUDA out of memory. Tried (",
        ),
        (ImportError("No module named 'x'"), 1, "ImportError: No module named 'x' (--debug"),
        (RecursionError("deep"), 1, "RecursionError: deep (--debug"),
        (Panic("at lib.rs"), 1, "inspect M: Panic: at lib.rs (--debug"),
        (ValueError("x" * 5000), 1, "x..."),
        (ConfigError("ours,\nin two lines"), 2, "bitsmoe: error: ours, in two lines"),
        (
            error_lines.ToldError("method rtn failed: m: OSError: x"),
            1,
            "error: method rtn failed: m: OSError: x",
        ),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_kinds_of_errors(error, status, line, debug, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(cli, "_inspect", raising(error))
    assert run_here(capfd, "inspect", "M")[0] == status
    found, stdout, stderr = run_here(capfd, *debug, "inspect", "M", *debug)
    assert (found, stdout) == (status, "")
    assert line in stderr.splitlines()[-1]
    assert ("Traceback" in stderr) == bool(debug)
    assert len(stderr.splitlines()) == 1 or debug


def test_faults_of_ours_are_called_so(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """A user should not look for the cause in the model; nor be told so of an error of another library."""
    monkeypatch.setattr(cli, "_inspect", lambda args, stdout: cli._print_json({1: set()}, stdout))
    assert "fault of bitsmoe-plugin" not in run_here(capfd, "inspect", "M")[2]  # json's TypeError
    monkeypatch.setattr(cli, "_inspect", lambda args, stdout: cli._subject(None))  # type: ignore[arg-type]
    status, _, stderr = run_here(capfd, "inspect", "M")
    assert status == 1
    assert "AttributeError" in stderr
    assert "fault of bitsmoe-plugin; please report it" in stderr


def test_the_innermost_subject_is_named() -> None:
    with pytest.raises(OSError) as error, error_lines.working_on("outer"), error_lines.working_on("inner"):  # noqa: PT011
        raise OSError("gone")
    assert error_lines.told(error.value, "inspect").startswith("inner: OSError: gone")


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Every command that can be run, those of ``bench`` too."""
    found = {}
    for action in parser._actions:
        for name, command in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
            found.update(
                {f"{name} {inner}".strip(): p for inner, p in (commands(command) or {"": command}).items()}
            )
    return found


def test_every_command_takes_debug_and_knows_its_name() -> None:
    found = commands(cli.build_parser())
    assert {"estimate", "quantize", "bench decode"} <= found.keys()
    for name, parser in found.items():
        assert "--debug" in parser.format_help(), name
        assert parser.get_default("command") == name


def test_what_a_process_of_compare_says_reaches_the_user(capfd) -> None:
    """Its last line was "its own message is above", among hundreds of others."""
    arguments = [
        "compare",
        str(MODEL),
        "--dataset",
        EVAL,
        "--eval",
        EVAL,
        "--methods",
        "rtn",
        "--group-size",
        "7",
    ]
    status, stdout, stderr = run_here(capfd, *arguments)
    assert (status, stdout) == (2, "")
    line = stderr.splitlines()[-1]
    assert line.startswith(
        "bitsmoe: error: method rtn failed: model.layers.0.mlp.experts.gate_up_proj: group size 7"
    )
