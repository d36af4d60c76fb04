"""What fewer bits of linear layers cost: measured, as the change of their decoder layer's output.

That is the unit in which rows of experts cost, so one integer program can weigh both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.calibration.carried import first_batches
from bitsmoe_plugin.calibration.dense_inputs import input_moments
from bitsmoe_plugin.codec.dense import BITS, DenseScheme
from bitsmoe_plugin.models.dense_units import DenseUnit
from bitsmoe_plugin.pipeline.dense_pass import token_weights
from bitsmoe_plugin.pipeline.progress import Hidden
from bitsmoe_plugin.pipeline.run import Run
from bitsmoe_plugin.rounding.dense_rounding import round_linear
from bitsmoe_plugin.runtime.dense_linear import pack, unpack

DenseCosts = list[list[float]]
"""Of each unit of a decoder layer at each of ``dense_units.CANDIDATES``."""
_TOKENS = 4096
"""Errors are measured on batches with at least so many; moments see all."""


def dense_costs(run: Run, index: int, outputs: Hidden) -> DenseCosts:
    """Round the units of a decoder layer one after the other and see what it puts out then; all is put back.

    Args:
        outputs: of the layer as it is, for ``run.forward.hidden``.

    Returns:
        empty if no unit is in the layer.
    """
    units = [unit for unit in run.units if unit.layer == index]
    if not units:
        return []
    modules: dict[str, Any] = {name: run.model.get_submodule(name) for unit in units for name in unit.schemes}
    weights = token_weights(run, outputs)
    moments = input_moments(run.forward, index, modules, weights)
    return [
        [*(_cost(run, index, outputs, unit, bits, moments, weights) for bits in BITS), 0.0] for unit in units
    ]


def _cost(
    run: Run,
    index: int,
    outputs: Hidden,
    unit: DenseUnit,
    bits: int,
    moments: dict[str, Tensor],
    weights: Tensor,
) -> float:
    sizes = [out.shape[:-1].numel() for out in outputs]
    count = next((n for n in range(1, len(sizes)) if sum(sizes[:n]) >= _TOKENS), len(sizes))
    with _rounded(run, unit, bits, moments):
        changed = run.forward.run(index, first_batches(run.forward.hidden, count))
    squares = [
        (a.float() - b.float()).square().mean(-1).flatten()
        for a, b in zip(changed, outputs[:count], strict=True)
    ]
    errors = torch.cat(squares)
    return float((errors * weights[: len(errors)].to(errors.device)).mean())


@contextmanager
def _rounded(run: Run, unit: DenseUnit, bits: int, moments: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the layers of a unit have the values that they would have in so many bits."""
    kept = {}
    try:
        for name, schemes in unit.schemes.items():
            module: Any = run.model.get_submodule(name)
            kept[name] = module.weight.data
            given = moments.get(name), run.config.damping, run.config.feedback
            rounded = round_linear(module.weight, schemes[bits], *given)
            module.weight.data = unpack(pack(*rounded, schemes[bits]), schemes[bits])
        yield
    finally:
        for name, weight in kept.items():
            run.model.get_submodule(name).weight.data = weight  # type: ignore[union-attr]


def unit_costs(run: Run) -> list[list[float]]:
    """Costs of all units in their order, once all layers are planned."""
    left = {index: list(costs) for index, costs in run.progress.dense_costs.items()}
    return [left[unit.layer].pop(0) for unit in run.units]


def chosen_dense(units: Sequence[DenseUnit], choices: Sequence[int]) -> dict[int, dict[str, DenseScheme]]:
    """``Run.dense`` of the candidates that were chosen."""
    found: dict[int, dict[str, DenseScheme]] = {}
    for unit, choice in zip(units, choices, strict=True):
        if choice < len(BITS):
            own = {name: schemes[BITS[choice]] for name, schemes in unit.schemes.items()}
            found.setdefault(unit.layer, {}).update(own)
    return found
