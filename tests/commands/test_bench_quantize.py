"""``bench quantize`` times a layer and its parts at several numbers of tokens."""

from __future__ import annotations

import json

import pytest
from command_line import run_here

from bitsmoe_plugin.base import spans
from bitsmoe_plugin.commands.bench import quantize

SIZE = ("--shape", "moe-tiny", "--experts", "4", "--bits", "4", "--gptq-experts", "0", "--device", "cpu")
BOTH = {"statistics", "bases", "factors", "costs", "allocation", "packing", "everything else"}
PARTS = {
    "fast": BOTH | {"rounding", "feedback"},
    "default": BOTH
    | {"feedback", "rounding of gate and up", "rounding of down", "refit of down", "scales", "trial"},
}


@pytest.mark.parametrize("method", PARTS)
def test_parts_add_up_at_every_number_of_tokens(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards parts that nobody times, or that are in the time of two."""
    status, out, err = run_here(
        capfd, "bench", "quantize", *SIZE, "--tokens", "256,512", "--method", method, "--json"
    )
    assert status == 0, err
    rows = json.loads(out)
    for tokens in (256, 512):
        found = {row["part"].strip(): row for row in rows if row["tokens"] == tokens}
        total = found.pop(f"bitsmoe ({method})")
        assert found.keys() == PARTS[method]
        assert sum(row["seconds"] for row in found.values()) == pytest.approx(total["seconds"])
        assert all(row["seconds"] > 0 for row in found.values())
        assert total["growth"] == (
            1 if tokens == 256 else pytest.approx(total["seconds"] / rows[0]["seconds"])
        )
    assert spans._RECORDER.get() is None


@pytest.mark.parametrize("text", ["", "8192,", "many", "0"])
def test_numbers_of_tokens_are_checked_first(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_here(capfd, "bench", "quantize", *SIZE, "--tokens", text)
    assert status == 2
    assert f"--tokens: {text!r} is no comma list of whole numbers of at least 1" in err


def test_growth_is_that_of_each_part_over_the_first_count() -> None:
    """A part that the first count did not have has none."""
    from bitsmoe_plugin.codec.layout import LayerShape

    times = {8: {"all": 2.0, "a": 1.0}, 16: {"all": 5.0, "a": 3.0, "new": 1.0}}
    rows = quantize._rows(times, LayerShape(1, 32, 32))
    assert [row["growth"] for row in rows] == [1.0, 1.0, 2.5, 3.0, None]
    assert [row["over_bitsmoe"] for row in rows] == [1.0, 0.5, 1.0, 0.6, 0.2]
