"""What fewer bits of linear layers cost: measured, as the change of their decoder layer's output.

That is the unit in which rows of experts cost, so one integer program can weigh both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.carried import first_batches
from bitsmoe_plugin.calibration.dense_inputs import input_moments
from bitsmoe_plugin.codec.dense import DenseScheme
from bitsmoe_plugin.models.dense_units import DenseUnit
from bitsmoe_plugin.models.families import routed_inputs
from bitsmoe_plugin.pipeline.dense_pass import token_weights
from bitsmoe_plugin.pipeline.progress import Hidden
from bitsmoe_plugin.pipeline.run import Run
from bitsmoe_plugin.rounding.dense_rounding import round_linear
from bitsmoe_plugin.runtime.dense_linear import pack, unpack

DenseCosts = list[list[float]]
"""Of each unit of a decoder layer at each of its candidates."""
_TOKENS = 4096
"""Errors are measured on batches with at least so many; moments see all."""


def dense_costs(run: Run, index: int, outputs: Hidden) -> DenseCosts:
    """Round the units of a decoder layer one after the other and see what it puts out then; all is put back.

    Tokens that are routed to other experts then do not count: how many they are is in proportion to the
    error, not to its square, and behind quantized layers there are hardly more of them than without it.

    Args:
        outputs: of the layer as it is, for ``run.forward.hidden``.

    Returns:
        empty if no unit is in the layer.
    """
    units = [unit for unit in run.units if unit.layer == index]
    if not units:
        return []
    modules: dict[str, Any] = {name: run.model.get_submodule(name) for unit in units for name in unit.names}
    weights = token_weights(run, outputs)
    moments = input_moments(run.forward, index, modules, weights)
    exact = _first_outputs(run, index)
    costs: DenseCosts = []
    for unit in units:
        costs.append([])
        for schemes in unit.schemes:
            with rounded_to(run, schemes, moments):
                changed = _first_outputs(run, index)
            costs[-1].append(_mean_error(exact, changed, weights[: run.tokens]))
        costs[-1].append(0.0)
    return costs


@dataclass(frozen=True)
class _Outputs:
    """What a decoder layer makes of some tokens.

    Attributes:
        hidden: ``[T, ...]``.
        experts: ``[T, k]``, those that each token is routed to in rising order; ``[T, 0]`` of a dense layer.
    """

    hidden: Tensor
    experts: Tensor


def _first_outputs(run: Run, index: int) -> _Outputs:
    """Outputs of a decoder layer for the first batches of ``run.forward.hidden``."""
    hidden = run.forward.hidden
    sizes = [part.shape[0] * part.shape[1] for part in hidden]
    count = next((n for n in range(1, len(sizes)) if sum(sizes[:n]) >= _TOKENS), len(sizes))
    inputs, routed = first_batches(hidden, count), list[Tensor]()
    with _routing(run, index, routed):
        outputs = torch.cat(
            [part.flatten(0, 1).flatten(1) for part in run.forward.run(index, inputs, routed.clear)]
        )
    experts = torch.cat(routed) if routed else outputs.new_empty(len(outputs), 0)
    return _Outputs(outputs, experts.sort(-1).values)


@contextmanager
def _routing(run: Run, index: int, routed: list[Tensor]) -> Iterator[None]:
    """Inside, calls of a layer's experts add to ``routed`` what they are told to use."""
    if index not in run.moe:
        yield
        return
    experts = run.moe[index].module

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routed.append(routed_inputs(experts, [*args, *kwargs.values()])[1])

    handle = experts.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _mean_error(exact: _Outputs, changed: _Outputs, weights: Tensor) -> float:
    """Over the tokens that go to the same experts; over all if there are none.

    Args:
        weights: of tokens that count, which come first.
    """
    errors = (changed.hidden.float() - exact.hidden.float()).square().mean(-1)[: len(weights)]
    errors = errors * weights[: len(errors)].to(errors.device)
    same = (exact.experts == changed.experts).all(-1)[: len(errors)]
    return float(errors[same].mean() if bool(same.any()) else errors.mean())


@contextmanager
def rounded_to(run: Run, schemes: Mapping[str, DenseScheme], moments: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, linear layers have the values that they would have in fewer bits.

    Args:
        moments: second moments of their inputs, by name.
    """
    kept = {}
    try:
        for name, scheme in schemes.items():
            module: Any = run.model.get_submodule(name)
            kept[name] = module.weight.data
            given = moments.get(name), run.config.damping, run.config.feedback
            rounded = round_linear(module.weight, scheme, *given)
            module.weight.data = unpack(pack(*rounded, scheme), scheme)
        yield
    finally:
        for name, weight in kept.items():
            run.model.get_submodule(name).weight.data = weight  # type: ignore[union-attr]


def unit_costs(run: Run) -> list[list[float]]:
    """Costs of all units in their order, once all layers are planned."""
    left = {index: list(costs) for index, costs in run.progress.dense_costs.items()}
    return [left[unit.layer].pop(0) for unit in run.units]


def chosen_dense(
    units: Sequence[DenseUnit], choices: Sequence[int], fixed: Mapping[int, dict[str, DenseScheme]]
) -> dict[int, dict[str, DenseScheme]]:
    """``Run.dense`` of the candidates that were chosen, besides what is ``fixed``."""
    found = {index: dict(schemes) for index, schemes in fixed.items()}
    for unit, choice in zip(units, choices, strict=True):
        if choice < len(unit.schemes):
            found.setdefault(unit.layer, {}).update(unit.schemes[choice])
    return found
