"""``bench quantize`` times parts of the package by replacing them wherever they are called."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import run_here

from bitsmoe_plugin.commands.bench import quantize

NOT_IN_FAST = {"refit of down", "down"}


def test_parts_of_the_method_fast_are_timed(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards modules that only this method calls, which rounds from the plan."""
    size = ("--shape", "moe-tiny", "--experts", "4", "--tokens", "256", "--bits", "4", "--gptq-experts", "0")
    status, out, _ = run_here(capfd, "bench", "quantize", *size, "--method", "fast", "--json")
    assert status == 0
    seconds = {row["part"].strip(): row["seconds"] for row in json.loads(out)[1:]}
    assert seconds.keys() == quantize.PARTS.keys()
    assert {part for part, value in seconds.items() if value == 0} == NOT_IN_FAST


def test_parts_are_themselves_again_afterwards() -> None:
    """Guards what is quantized later in the same process."""
    before = dict(quantize.PARTS)
    with quantize._timed(torch.device("cpu")):
        assert quantize.statistics.collect is not before["statistics"]
    assert quantize.statistics.collect is before["statistics"]
    assert quantize.allocate is before["allocation"]
