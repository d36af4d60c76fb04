"""Where the time of a quantization went is kept beside the packed model, and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run_here

from bitsmoe_plugin.base.work_directory import WorkDirectory
from bitsmoe_plugin.commands.report.checkpoint_data import gather
from bitsmoe_plugin.commands.times import FILE, read_times, told_times, write_times
from bitsmoe_plugin.pipeline import progress_on_disk

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_parts_are_told_the_longest_first(tmp_path: Path) -> None:
    write_times(tmp_path, {"costs": 1.0, "packing": 0.01, "feedback": 3.0})
    assert list(read_times(tmp_path).items()) == [("feedback", 3.0), ("costs", 1.0), ("packing", 0.01)]
    assert told_times(read_times(tmp_path)) == "where 4 s went: feedback 75 %, costs 25 %"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"seconds": 3}', '{"seconds": {"a": "b", "c": true, "d": -1}}']
)
def test_other_files_of_that_name_are_no_times(content: str, tmp_path: Path) -> None:
    """Checkpoints come from anywhere."""
    (tmp_path / FILE).write_text(content)
    assert read_times(tmp_path) == {}


def test_a_run_that_goes_on_adds_to_what_the_first_took(tmp_path: Path) -> None:
    """What was committed with a finished layer is there in the next process."""
    for wanted in (1.0, 2.0):
        progress = progress_on_disk.ProgressOnDisk(WorkDirectory(tmp_path), {"a": 1}, "cpu")
        progress.seconds["costs"] = progress.seconds.get("costs", 0.0) + 1.0
        progress.finish_plan(0, None, [])
        assert progress.seconds == {"costs": wanted}


def test_quantize_keeps_and_tells_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    text = ("--dataset", str(EXAMPLES / "data" / "calibration.jsonl"), "--calibration-tokens", "1024")
    options = ("--sequence-length", "128", "--method", "fast", "--device", "cpu")
    status, _, err = run_here(capfd, "quantize", str(EXAMPLES / "moe-tiny"), str(out), *text, *options)
    assert status == 0, err
    assert " s went: " in err
    found = json.loads((out / FILE).read_text())["seconds"]
    assert {"forward passes", "statistics", "bases", "costs", "allocation", "rounding", "packing"} <= set(
        found
    )
    assert gather(out).seconds == found
