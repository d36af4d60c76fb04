"""``bitsmoe compare --bits FIRST:LAST:STEP``: which points there are, and that none is measured twice, or
taken over where something changed."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run_here

from bitsmoe_plugin import ConfigError
from bitsmoe_plugin.commands.compare import curve
from bitsmoe_plugin.commands.compare.budget_range import budgets
from bitsmoe_plugin.commands.compare.curve import compare_curve, points
from bitsmoe_plugin.commands.compare.task import ComparisonTask
from bitsmoe_plugin.errors import QuantizationError

pytest.importorskip("matplotlib")

from bitsmoe_plugin.commands.compare.curve_plot import curves, plots

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "moe-tiny")
CALIBRATION, EVAL = (str(EXAMPLES / "data" / f"{name}.jsonl") for name in ("calibration", "eval"))
TASK = ComparisonTask(
    model=MODEL, bits=2.0, factor_bits=None, dataset=CALIBRATION, eval=EVAL, calibration_tokens=4096,
    sequence_length=128, batch_size=8, seed=0, max_tokens=2000, group_size=64, prompt=None, new_tokens=40,
)  # fmt: skip


def test_ranges_hold_both_ends_and_no_rounding_errors() -> None:
    """1.2 + 4 * 0.2 in binary is above 2.0, and a budget of 2.0000000000000004 has another name and file."""
    found = budgets("1.2:4:0.2")
    assert isinstance(found, tuple)
    assert len(found) == 15
    assert (found[0], found[4], found[-1]) == (1.2, 2.0, 4.0)
    assert budgets("2:2:1") == (2.0,)
    assert budgets("2:3:0.4") == (2.0, 2.4, 2.8)
    assert budgets("2.5") == 2.5


@pytest.mark.parametrize(
    "text",
    ["", "two", "1:2", "1:2:3:4", "2:1:0.5", "0:1:0.5", "1:2:0", "1:2:-1", "1:nan:1", "1:inf:1", "nan"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"FIRST:LAST:STEP"):
        budgets(text)


def test_ranges_without_end_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"has 3001 budgets; at most 200"):
        budgets("1:4:0.001")


def test_others_stand_at_their_widths_and_full_precision_once() -> None:
    found = points(TASK, ("full", "bitsmoe", "gptq"), (1.5, 2.0, 2.5, 3.0))
    names = ["full", "bitsmoe-1.5", "bitsmoe-2", "bitsmoe-2.5", "bitsmoe-3", "gptq-2", "gptq-3"]
    assert [point.name for point in found] == names
    assert [point.task.bits for point in found[1:]] == [1.5, 2.0, 2.5, 3.0, 2.0, 3.0]
    assert [point.task.baseline_bits for point in found[5:]] == [2, 3]
    with pytest.raises(
        ConfigError, match=r"method gptq has widths of 2, 3, 4, 8 bits, and none is from 1.2 to"
    ):
        points(TASK, ("bitsmoe", "gptq"), (1.2, 1.8))
    for option in ({"size": "1MB"}, {"factor_bits": 2.0}, {"prompt": "The"}):
        with pytest.raises(ConfigError, match="is for one budget"):
            points(replace(TASK, **option), ("bitsmoe",), (1.5, 2.0))


class Measurements:
    """Stands in for the processes; says how often they were asked for what."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails_at = ""
        self.error: BaseException = QuantizationError("no")

    def __call__(self, method: str, task: ComparisonTask, debug: bool) -> dict[str, Any]:
        name = f"{method}-{task.bits:g}"
        if name == self.fails_at:
            raise self.error
        self.asked.append(name)
        numbers = {"bits_per_weight": task.bits, "kl_divergence": 0.1 / task.bits, "per_domain": {}}
        return {"method": method, **numbers, "calibration": task.calibration_tokens}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measurements:
    found = Measurements()
    monkeypatch.setattr(curve, "in_process", found)
    return found


BITSMOE = ["bitsmoe-2", "bitsmoe-2.5", "bitsmoe-3"]


def test_an_interrupted_curve_goes_on_and_a_finished_one_is_there(
    measured: Measurements, tmp_path: Path
) -> None:
    def run() -> list[dict[str, Any]]:
        return compare_curve(TASK, ("bitsmoe", "rtn"), (2.0, 2.5, 3.0), tmp_path)

    measured.fails_at = "bitsmoe-3"
    with pytest.raises(QuantizationError):
        run()
    assert measured.asked == BITSMOE[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["points"]
    measured.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt, match=r"2 of 5 points are in .*points, the same command goes on"):
        run()
    measured.fails_at = ""
    rows = run()
    assert measured.asked == [*BITSMOE, "rtn-2", "rtn-3"]
    assert [row["bits_per_weight"] for row in rows] == [2.0, 2.5, 3.0, 2.0, 3.0]
    assert run() == rows
    assert len(measured.asked) == 5
    assert json.loads((tmp_path / "curve.json").read_text())["results"] == rows
    assert (tmp_path / "kl-by-bits-dark.png").read_bytes().startswith(b"\x89PNG")
    # A finer range asks for what is new alone.
    compare_curve(TASK, ("bitsmoe",), (2.0, 2.25, 2.5), tmp_path)
    assert measured.asked[5:] == ["bitsmoe-2.25"]


def _options(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ComparisonTask:
    return replace(TASK, calibration_tokens=8192)


def _code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ComparisonTask:
    (folder / "new.py").write_text("x = 1")
    files = [*curve.source_files(), folder / "new.py"]
    monkeypatch.setattr(curve, "source_files", lambda: files)
    return TASK


def _library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ComparisonTask:
    monkeypatch.setattr(curve, "version", lambda name: "0.0")
    return TASK


def _text(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ComparisonTask:
    with Path(TASK.eval).open("a") as file:
        file.write('{"text": "more"}\n')
    return TASK


def _damage(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ComparisonTask:
    for path in (folder / "out" / "points").iterdir():
        path.write_text(path.read_text()[:20])
    return TASK


@pytest.mark.parametrize("change", [_options, _code, _library, _text, _damage])
def test_a_changed_point_is_measured_again(
    measured: Measurements,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch, Path], ComparisonTask],
) -> None:
    """Guards a plot whose points were made by different programs, or of different text."""
    (tmp_path / "eval.jsonl").write_text(Path(EVAL).read_text())
    monkeypatch.setattr(__name__ + ".TASK", replace(TASK, eval=str(tmp_path / "eval.jsonl")))
    compare_curve(TASK, ("bitsmoe",), (2.0, 2.5, 3.0), tmp_path / "out")
    rows = compare_curve(change(monkeypatch, tmp_path), ("bitsmoe",), (2.0, 2.5, 3.0), tmp_path / "out")
    assert measured.asked == BITSMOE * 2
    assert {row["calibration"] for row in rows} == {8192 if change is _options else 4096}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"tune": 1}, ["bitsmoe-2"]),
        ({"dense_bits": 8}, ["bitsmoe-2"]),
        ({"autoround_steps": 100}, []),
        ({"group_size": 32}, ["rtn-2"]),
        ({"seed": 1}, ["full-2", "bitsmoe-2", "rtn-2"]),
    ],
)
def test_options_of_one_method_leave_the_points_of_others(
    change: dict[str, Any], again: list[str], measured: Measurements, tmp_path: Path
) -> None:
    """A peer's hours are not spent anew because our method is tuned."""
    methods = ("full", "bitsmoe", "rtn")
    compare_curve(TASK, methods, (2.0,), tmp_path)
    before = len(measured.asked)
    compare_curve(replace(TASK, **{"calibration_tokens": 4096, **change}), methods, (2.0,), tmp_path)
    assert measured.asked[before:] == again


def test_a_range_that_cannot_be_reached_is_refused_before_anything(
    measured: Measurements, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=r"bits=0\.12 cannot be met: the smallest reachable"):
        compare_curve(TASK, ("full", "bitsmoe"), (0.12, 2.0), tmp_path / "out")
    assert not measured.asked
    assert not (tmp_path / "out").exists()


def test_plots_show_what_has_a_place_on_a_logarithmic_axis() -> None:
    rows = [
        {"method": "full", "bits_per_weight": 16, "kl_divergence": 0.0},
        {"method": "bitsmoe", "bits_per_weight": 3.0, "kl_divergence": 0.01},
        {"method": "bitsmoe", "bits_per_weight": 2.0, "kl_divergence": 0.02},
        {"method": "gptq", "bits_per_weight": 2.3, "kl_divergence": 0.06},
    ]
    series = curves(rows)
    assert {name: values.tolist() for name, values in series.items()} == {
        "bitsmoe": [[2.0, 0.02], [3.0, 0.01]],
        "gptq": [[2.3, 0.06]],
    }
    assert [name for name, _ in plots(rows)] == ["kl-by-bits.png", "kl-by-bits-dark.png"]
    assert not list(plots(rows[:1]))


def test_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One real point of a method that needs no calibration, twice: the second time nothing is computed."""
    options = ["--dataset", CALIBRATION, "--eval", EVAL, "--methods", "rtn", "--max-tokens", "1000"]
    options += ["--sequence-length", "128", "--bits", "2:2.5:0.5", "--out", str(tmp_path / "c"), "--json"]
    status, printed, _ = run_here(capfd, "compare", MODEL, *options)
    (row,) = json.loads(printed)["results"]
    assert status == 0
    assert row["kl_divergence"] > 0.05
    assert row["kl_median"] < row["kl_divergence"] < row["kl_99"] <= row["kl_999"]
    assert 0 < row["routing_change"] < 1
    status, again, stderr = run_here(capfd, "compare", MODEL, *options)
    assert (status, again) == (0, printed)
    assert "rtn-2 is there" in stderr
    status, _, stderr = run_here(capfd, "compare", MODEL, *options[:4], "--out", str(tmp_path / "c"))
    assert status == 2
    assert "--out is for curves" in stderr
