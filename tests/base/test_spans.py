"""Parts of the work are timed where they are done."""

from __future__ import annotations

import pytest

from bitsmoe_plugin.base import spans
from bitsmoe_plugin.base.spans import recorded, span


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second after the last."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(spans.time, "perf_counter", lambda: float(next(ticks)))


@span("inner")
def inner() -> None:
    with span("innermost"):
        pass


def test_time_inside_another_part_is_the_inner_ones_alone() -> None:
    """So that parts add up to the whole."""
    seconds: dict[str, float] = {"inner": 10.0}
    with recorded(seconds):
        with span("outer"):
            inner()
        with span("outer"):
            pass
    assert seconds == {"outer": 3.0, "inner": 12.0, "innermost": 1.0}


def test_an_error_ends_its_parts() -> None:
    seconds: dict[str, float] = {}
    with recorded(seconds):
        with pytest.raises(KeyError), span("outer"), span("inner"):
            raise KeyError
        with span("next"):
            pass
    assert seconds == {"outer": 2.0, "inner": 1.0, "next": 1.0}


def test_nobody_records_nothing_is_kept() -> None:
    inner()
    assert spans._RECORDER.get() is None


def test_a_run_within_a_command_hands_on_all_that_it_has_on_record() -> None:
    """A run that goes on brings along what it took before it was interrupted."""
    command: dict[str, float] = {}
    run = {"costs": 100.0}
    with recorded(command), span("loading"), recorded(run), span("costs"):
        pass
    assert run == {"costs": 101.0}
    assert command.keys() == {"loading", "costs"}
    assert command["costs"] == 101.0
