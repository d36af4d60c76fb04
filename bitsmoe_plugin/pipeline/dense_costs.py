"""What fewer bits of linear layers cost: measured, as the change of their decoder layer's output.

That is the unit in which rows of experts cost, so one integer program can weigh both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.carried import Carried, first_batches
from bitsmoe_plugin.calibration.dense_inputs import input_moments
from bitsmoe_plugin.codec.dense import DenseScheme
from bitsmoe_plugin.models.dense_units import DenseUnit
from bitsmoe_plugin.models.families import routed_inputs
from bitsmoe_plugin.pipeline.dense_pass import seen_tokens
from bitsmoe_plugin.pipeline.noise import with_noise
from bitsmoe_plugin.pipeline.progress import Hidden
from bitsmoe_plugin.pipeline.run import Run
from bitsmoe_plugin.rounding.dense_rounding import round_linear
from bitsmoe_plugin.runtime.dense_linear import pack, unpack
from bitsmoe_plugin.spectral.error_feedback import damping

DenseCosts = list[list[float]]
"""Of each unit of a decoder layer at each of its candidates."""
_TOKENS = 4096
"""Errors are measured on batches with at least so many; moments see all."""


def dense_costs(run: Run, index: int, outputs: Hidden, error: float = 0.0) -> DenseCosts:
    """Round the units of a decoder layer one after the other and see what it puts out then; all is put back.

    Inputs are given the error that they will have, as noise. Tokens that a unit sends to other experts are
    few, and cost much: without noise in front of them they would cost twice of all else at 4 bits, but most
    of them go to other experts anyway where layers before are quantized. In the first layer there are none.

    Args:
        outputs: of the layer as it is, for ``run.forward.hidden``.
        error: that is expected of the inputs, in the unit of costs.

    Returns:
        empty if no unit is in the layer.
    """
    units = [unit for unit in run.units if unit.layer == index]
    if not units:
        return []
    modules: dict[str, Any] = {name: run.model.get_submodule(name) for unit in units for name in unit.names}
    weights = seen_tokens(run, run.forward.hidden, outputs)
    moments = input_moments(run.forward, index, modules, weights)
    inputs = _first(run.forward.hidden)
    exact = before = _outputs(run, index, inputs)
    noisy = inputs
    if error:
        noisy = with_noise(inputs, error, run.config.seed)
        before = _outputs(run, index, noisy)
    costs: DenseCosts = []
    for unit in units:
        costs.append([])
        for schemes in unit.schemes:
            with rounded_to(run, schemes, moments):
                after = _outputs(run, index, noisy)
            if run.config.compensation:
                after = _without_shift(before, after, weights[: run.tokens])
            costs[-1].append(_added_error(exact, before, after, weights[: run.tokens]))
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


def _first(hidden: Hidden) -> Carried:
    """The first batches with enough tokens."""
    sizes = [part.shape[0] * part.shape[1] for part in hidden]
    count = next((n for n in range(1, len(sizes)) if sum(sizes[:n]) >= _TOKENS), len(sizes))
    return first_batches(hidden, count)


def _outputs(run: Run, index: int, inputs: Carried) -> _Outputs:
    """Outputs of a decoder layer."""
    routed = list[Tensor]()
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


def _without_shift(before: _Outputs, after: _Outputs, weights: Tensor) -> _Outputs:
    """``after`` without what the change from ``before`` has in common for all tokens.

    Experts are fitted to what the layers before them lost, and make up for that easily. (SmolLM2 cut into
    experts: attention that looks a little more or less at the first token was 3/4 of what 4 bits seemed to
    cost in one layer, 40 % in most. The layer was given 8 bits for it, and KL rose by 4 %.)
    """
    change = after.hidden.float() - before.hidden.float()
    count = min(len(weights), len(change))
    weights = weights[:count].to(change.device)
    shift = weights @ change[:count] / weights.sum().clamp_min(1e-30)
    return replace(after, hidden=after.hidden.float() - shift)


def _added_error(exact: _Outputs, before: _Outputs, after: _Outputs, weights: Tensor) -> float:
    """By which the mean square error of a layer's outputs rises.

    Where tokens go to the same experts, errors are small and independent: the square of the change is added.
    For the others it is told by the outputs that they should have.

    Args:
        exact: of inputs without error.
        before, after: of inputs with error.
        weights: of tokens that count, which come first.
    """

    def squares(one: _Outputs, other: _Outputs) -> Tensor:
        return (one.hidden.float() - other.hidden.float()).square().mean(-1)

    same, change = (before.experts == after.experts).all(-1), squares(after, before)
    added = change.where(same, squares(after, exact) - squares(before, exact))
    count = min(len(weights), len(added))
    weights, least = weights[:count].to(added.device), change.where(same, 0.0)
    # Not below what is sure: a few tokens that change their experts may come out better by chance.
    return max(float((found[:count] * weights).mean()) for found in (added, least))


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
            share = damping(run.config, run.tokens, module.in_features)
            given = moments.get(name), share, run.config.feedback
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
