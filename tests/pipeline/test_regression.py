"""The bundled model's quality against ``regression.json``: fails when it drops by more than chance."""

from __future__ import annotations

import json
import statistics

import pytest
import regression

DEVIATIONS = 5
"""Standard deviations of chance, see ``regression``, that a number may be above the mean."""
NOISES = (None, regression.RUNS, regression.RUNS + 1)
"""Runs of which the mean decides: the tails of one run are longer than a Gaussian's (unseen error at 4 bits
of 40 runs, with several disturbances and thread counts: one was 5.5 deviations above the mean, the others at
most 2.3)."""


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("bits", regression.BITS)
def test_quality_does_not_drop(bits: float) -> None:
    """After a change that was meant to change quality, run ``python tests/support/regression.py`` and commit
    what it writes, with the reason."""
    wanted = json.loads(regression.FILE.read_text(encoding="utf-8"))[str(bits)]
    limits = {name: entry["mean"] + DEVIATIONS * entry["deviation"] for name, entry in wanted.items()}
    runs: list[dict[str, float]] = []
    for noise in NOISES:
        runs.append(regression.measure(bits, noise))
        assert runs[-1].keys() == wanted.keys()
        assert runs[-1]["bits_per_weight"] <= bits
        dropped = _dropped(runs, limits)
        if not dropped:
            break
    assert not dropped


def _dropped(runs: list[dict[str, float]], limits: dict[str, float]) -> dict[str, str]:
    means = {name: statistics.mean(run[name] for run in runs) for name in limits}
    return {
        name: f"{means[name]:.6g}, at most {limit:.6g}"
        for name, limit in limits.items()
        if means[name] > limit * (1 + 1e-9)
    }
