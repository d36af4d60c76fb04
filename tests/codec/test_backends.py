"""One place decides what computes, and its choice is what the call sites use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.codec import bit_strings, layout, row_codec, trellis, uniform
from bitsmoe_plugin.codec.backends import RoundingBackend, backend_for, gpu, native, reference
from bitsmoe_plugin.codec.scale_grid import ScaleGrid
from bitsmoe_plugin.rounding import feedback_rounding
from bitsmoe_plugin.spectral.error_feedback import Feedback

ROWS, ONES = torch.ones(2, 32), torch.ones(2, 32)
BITS = torch.full((2,), 2)


def test_the_backend_follows_from_device_dtype_and_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards C that reads float64 as float32, or memory of a GPU; and installations without a compiler."""
    monkeypatch.setattr(native, "library", lambda: object())
    assert backend_for(ROWS, BITS) is native.COMPILED
    assert backend_for(ROWS, ONES.double()) is reference.REFERENCE
    assert backend_for(ROWS.to("meta")) is reference.REFERENCE
    monkeypatch.setattr(gpu, "available", lambda *tensors: all(t.device.type == "meta" for t in tensors))
    assert backend_for(ROWS.to("meta"), BITS.to("meta")) is gpu.TRITON
    assert backend_for(ROWS) is native.COMPILED
    monkeypatch.setattr(native, "library", lambda: None)
    assert backend_for(ROWS) is reference.REFERENCE


def along(rank: bool, unit: Tensor | None) -> None:
    scales, grid = torch.ones(1, 1, 2), ScaleGrid(torch.zeros(1, 2).half(), torch.ones(1, 2).half())
    if rank:
        feedback = Feedback(unit, torch.ones(1, 1, 2))
        weights = torch.ones(1, 1, 32)
        feedback_rounding.round_along_rank(
            ROWS[None, None], BITS[None, None], feedback, weights, grid, scales, "trellis"
        )
        return
    own, feedback = ScaleGrid(grid.low[0], grid.step[0]), Feedback(unit, torch.ones(1, 32))
    feedback_rounding.round_along_neurons(ROWS[None], BITS[None], feedback, own, scales[0], "trellis")


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("trellis_codes", lambda: trellis.encode(ROWS, ONES, 2)),
        ("best_scales", lambda: uniform.best_scale(ROWS, ONES, 2)),
        ("best_scales", lambda: uniform.best_scales(ROWS, ONES, BITS)),
        ("rounded", lambda: row_codec.encode(ROWS, torch.ones(2), ONES, BITS, "trellis")),
        ("rounded", lambda: row_codec.round_rows(ROWS, torch.ones(2), ONES, BITS, "uniform")),
        ("round_rank", lambda: along(True, torch.eye(2)[None, None])),
        ("round_rank", lambda: along(True, None)),
        ("choose_scales", lambda: along(False, torch.eye(32)[None])),
        ("round_rank", lambda: along(False, None)),
        ("pack_codes", lambda: bit_strings.pack_codes(ROWS.int(), 2)),
        ("pack", lambda: layout.pack_expert(ROWS.int(), BITS)),
    ],
)
def test_every_operation_is_that_of_the_chosen_backend(
    operation: str, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards call sites that decide for themselves."""

    class Asked(Exception):
        pass

    def refuse(*_: object) -> None:
        raise Asked

    chosen: RoundingBackend = backend_for(ROWS)
    monkeypatch.setattr(chosen, operation, refuse)
    with pytest.raises(Asked):
        call()
