"""Factors that are kept between scales and rounding, or computed twice: where, and to the same effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bitsmoe_plugin.base import devices
from bitsmoe_plugin.checkpoint.manifest import tensor_digest
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.rounding import kept_factors
from bitsmoe_plugin.rounding.kept_factors import KeptFactors, kept_bytes
from bitsmoe_plugin.rounding.layer_rounding import round_layer
from bitsmoe_plugin.spectral import bases
from bitsmoe_plugin.spectral.layer_problem import build_problem

CPU = torch.device("cpu")


def _free(bytes_: int | None) -> Callable[[torch.device], int | None]:
    return lambda device: bytes_


def test_kept_where_a_quarter_of_free_memory_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LayerShape(4, 32, 16)
    needed = 4 * shape.weights
    for free, expected in ((4 * needed, needed), (4 * needed - 4, 0), (None, 0)):
        monkeypatch.setattr(kept_factors, "available_memory", _free(free))
        assert kept_bytes(shape, CPU) == expected


@pytest.mark.parametrize("keep", [True, False])
def test_taken_factors_belong_to_the_caller(keep: bool) -> None:
    """Guards against factors that are overwritten by rounding and looked at again, or held on to."""
    calls: list[list[int]] = []

    def compute(experts: list[int]) -> torch.Tensor:
        calls.append(experts)
        return torch.tensor(experts).float()

    factors = KeptFactors(compute, keep)
    groups = [[0, 1], [2, 3]]
    for group in groups:
        factors.look(group)
    for group in groups:
        factors.take(group).zero_()
    assert calls == groups * (1 if keep else 2)
    assert torch.equal(factors.take([0, 1]), torch.tensor([0.0, 1.0]))


def test_the_same_bytes_either_way_and_half_the_work(make_layer, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(6, 40, 64, 500)
    problem = build_problem("layer", layer.weights, layer.activations, layer.gating, BitsMoEConfig())
    bits = torch.full((3, 6, 64), 2)
    monkeypatch.setattr(devices, "CPU_WORKING_SET", 2 * 64**2)  # three groups
    counted, seen = bases._new_factors, []

    def count(weights, inverses, experts, wanted, neurons=None):
        seen.append(len(wanted) * len(experts))
        return counted(weights, inverses, experts, wanted, neurons)

    monkeypatch.setattr(bases, "_new_factors", count)
    digests, work = [], []
    for free in (2**40, 0):
        monkeypatch.setattr(kept_factors, "available_memory", _free(free))
        seen.clear()
        digests.append(tensor_digest(round_layer(problem, bits).packed))
        work.append(sum(seen))
    assert digests[0] == digests[1]
    assert work == [18, 36]
