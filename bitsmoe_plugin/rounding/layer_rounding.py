"""Rounding of one MoE layer at the widths that were allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.devices import computing_on
from bitsmoe_plugin.base.free_memory import release_free_memory
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.base.workers import ALONE, Workers
from bitsmoe_plugin.codec.scale_grid import ScaleGrid
from bitsmoe_plugin.rounding import feedback_rounding, row_scales
from bitsmoe_plugin.rounding.feedback_rounding import RoundedRows, round_along_neurons, round_along_rank
from bitsmoe_plugin.rounding.kept_factors import KeptFactors, kept_bytes
from bitsmoe_plugin.rounding.refit_down import Exact, exact, refit_down
from bitsmoe_plugin.rounding.rounded_layer import RoundedExperts, RoundedLayer, merged_experts, pack_layer
from bitsmoe_plugin.spectral.error_feedback import Feedback, feedback_of, stacked_feedback
from bitsmoe_plugin.spectral.layer_feedback import rank_feedback
from bitsmoe_plugin.spectral.layer_problem import LayerProblem

_REFIT_OCTAVES = 0.5
"""By which refitting may change the scales of a rank's extreme rows; others have the room between these.
(Bundled model at 2 and 3 bits: 0.4 and less for nine rows of ten.)"""


def round_layer(problem: LayerProblem, row_bits: Tensor, workers: Workers = ALONE) -> RoundedLayer:
    """Round all experts at the allocated widths and pack them.

    Args:
        row_bits: ``[f, E, r]`` int64.
        workers: share the work; all must call this with the same arguments, and get the same.

    Returns:
        the layer, on the CPU.
    """
    everyone = list(range(problem.shape.num_experts))
    with computing_on(problem.device):
        row_bits = row_bits.to(problem.device)
        rounded, grid = round_experts(problem, row_bits, everyone, workers=workers)
        return pack_layer(rounded, grid, problem.bases, row_bits, problem.config.widths)


def round_experts(
    problem: LayerProblem,
    bits: Tensor,
    experts: list[int],
    feedback: dict[int, Feedback] | None = None,
    given: dict[int, Exact] | None = None,
    with_values: bool = False,
    workers: Workers = ALONE,
) -> tuple[RoundedExperts, ScaleGrid]:
    """Round some experts at given widths, a group of bounded working set after the other.

    Args:
        bits: ``[f, e, r]`` int64.
        experts: their ids.
        feedback: of each, if known.
        given: likewise.
        with_values: also return what the codes stand for.
        workers: share the groups, and get all of them.

    Returns:
        the rows, and their scale grid ``[f, r]``.
    """
    groups = {i: part for i, part in enumerate(problem.chunks(len(experts))) if workers.takes(i)}
    keep = kept_bytes(problem.shape, problem.device) > 0
    inputs, down = KeptFactors(problem.input_factors, keep), KeptFactors(problem.down_factors, keep)
    own = {i: _input_scales(problem, inputs, bits[:-1, part], experts[part]) for i, part in groups.items()}
    scales = _of_all(workers, own, problem.device)
    grid = ScaleGrid.covering(scales, bits[:-1] > 0)
    found = {i: _down_scales(problem, down, bits[-1, part], experts[part]) for i, part in groups.items()}
    down_grid = _wider_grid(_of_all(workers, found, problem.device), bits[-1] > 0)
    done = {}
    for i, part in groups.items():
        seen = [given[e] if given else exact(problem, e) for e in experts[part]]
        known = _stacked_feedback(problem, experts[part], seen, feedback)
        factors = inputs.take(experts[part])
        rows = _round_inputs(problem, factors, bits[:-1, part], experts[part], known, grid, scales[:, part])
        first = RoundedExperts.of(rows, bits[:-1, part], with_values)
        refitted = _refitted(problem, down, rows.values, bits[-1, part], experts[part], seen)
        del factors, rows, known, seen
        last = RoundedExperts.of(
            _round_down(problem, refitted, bits[-1, part], down_grid), bits[-1:, part], with_values
        )
        done[i] = RoundedExperts.of_all_factors(first, last)
        del refitted
    release_free_memory()  # not of each group: the next one takes what it left
    return merged_experts(done, workers, problem.device), grid.stacked_with(down_grid)


@span("rounding of gate and up")
def _round_inputs(
    problem: LayerProblem,
    factors: Tensor,
    bits: Tensor,
    experts: list[int],
    feedback: Feedback,
    grid: ScaleGrid,
    scales: Tensor,
) -> RoundedRows:
    """
    Args:
        factors: overwritten.
        bits: ``[n, e, r]``, as ``scales``.
    """
    neuron = problem.statistics.neuron_weights[:, experts]
    return round_along_rank(factors, bits, feedback, neuron, grid, scales, problem.config.grid, in_place=True)


@span("rounding of down")
def _round_down(problem: LayerProblem, down: _Down, bits: Tensor, grid: ScaleGrid) -> RoundedRows:
    """With a first axis of length 1."""
    given = down.factors, bits, down.feedback, grid, down.scales
    return feedback_rounding.stacked(round_along_neurons(*given, problem.config.grid))


def _of_all(workers: Workers, scales: dict[int, Tensor], device: torch.device) -> Tensor:
    """Scales ``[..., e, r]`` of all groups from those of this process's."""
    if workers.size > 1:
        scales = workers.merged({i: part.cpu() for i, part in scales.items()})
    return torch.cat([part.to(device) for part in scales.values()], dim=-2)


@span("scales")
def _input_scales(problem: LayerProblem, factors: KeptFactors, bits: Tensor, experts: list[int]) -> Tensor:
    """Scales ``[n, e, r]`` float32 of gate and up rows of ``bits`` alike."""
    choose = row_scales.unbiased_scales if problem.config.widening else row_scales.best_scales
    neuron = problem.statistics.neuron_weights[:, experts, None]
    return choose(factors.look(experts), neuron, bits, problem.config.grid)


@span("scales")
def _down_scales(problem: LayerProblem, factors: KeptFactors, bits: Tensor, experts: list[int]) -> Tensor:
    """Scales ``[e, r]`` float32 of down rows as they are before they are refitted.

    From all neurons: rows are often large at few of them alone. (SmolLM2 cut into experts of 768 neurons, 2
    bits: KL 0.797 with scales from every third, 0.659 with this.)
    """
    rows = factors.look(experts)
    alike = torch.ones(rows.shape[-1], device=rows.device)
    return row_scales.best_scales(rows, alike, bits, problem.config.grid)


def _wider_grid(scales: Tensor, used: Tensor) -> ScaleGrid:
    """The grid of down rows, from the scales that they have before they are refitted: so the refitted ones of
    all experts need not be held at once."""
    wider = torch.cat([scales * 2**-_REFIT_OCTAVES, scales * 2**_REFIT_OCTAVES])
    return ScaleGrid.covering(wider, used.repeat(2, 1))


@dataclass(frozen=True)
class _Down:
    """Down factors of some experts before they are rounded.

    Attributes:
        factors: ``[e, r, I]``.
        feedback: of their neurons, ``[e]``.
        scales: ``[e, r]``.
    """

    factors: Tensor
    feedback: Feedback
    scales: Tensor


def _refitted(
    problem: LayerProblem,
    down: KeptFactors,
    values: Tensor,
    bits: Tensor,
    experts: list[int],
    given: list[Exact],
) -> _Down:
    """
    Args:
        down: of the group, taken.
        values: ``[n, e, r, I]``, decoded gate and up.
        bits: ``[e, r]``, of down.
    """
    factors = down.take(experts)
    moments = refit_down(problem, factors, values, experts, given)
    feedback = feedback_of(moments, problem.config, [known.tokens.routed for known in given])
    scales = row_scales.best_scales(factors, feedback.variance[:, None], bits, problem.config.grid)
    return _Down(factors, feedback, scales)


def _stacked_feedback(
    problem: LayerProblem, experts: list[int], given: list[Exact], known: dict[int, Feedback] | None
) -> Feedback:
    """Feedback of gate and up of some experts, ``[1 or 2, e]``."""
    found = [
        known[e] if known else rank_feedback(problem, e, seen.slot_weights)
        for e, seen in zip(experts, given, strict=True)
    ]
    return stacked_feedback(found, dim=1)
