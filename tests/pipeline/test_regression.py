"""The bundled model's quality against ``regression.json``: fails when it drops by more than chance."""

from __future__ import annotations

import json

import pytest
import regression

DEVIATIONS = 5
"""Standard deviations of chance, see ``regression``, that a number may be above the mean."""


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("bits", regression.BITS)
def test_quality_does_not_drop(bits: float) -> None:
    """After a change that was meant to change quality, run ``python tests/support/regression.py`` and commit
    what it writes, with the reason."""
    wanted = json.loads(regression.FILE.read_text(encoding="utf-8"))[str(bits)]
    found = regression.measure(bits)
    assert found.keys() == wanted.keys()
    assert found["bits_per_weight"] <= bits
    limits = {name: entry["mean"] + DEVIATIONS * entry["deviation"] for name, entry in wanted.items()}
    dropped = {
        name: f"{found[name]:.6g}, at most {limit:.6g}"
        for name, limit in limits.items()
        if found[name] > limit * (1 + 1e-9)
    }
    assert not dropped
