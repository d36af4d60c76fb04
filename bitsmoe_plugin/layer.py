"""Quantization of one MoE layer: what its rows would cost, and rounding them at chosen widths.

This is the numerical heart that the pipeline calls twice per layer: ``plan_layer`` before the
allocation, ``round_layer`` after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin import coding, grids, packing, rounding
from bitsmoe_plugin.allocation import allocate
from bitsmoe_plugin.packing import LayerShape, PackedExperts
from bitsmoe_plugin.problem import LayerProblem, error_feedback, rank_feedback
from bitsmoe_plugin.spectral import SharedBases

GATE_UP_WEIGHT = 2.0
"""Gate and up errors count double in the allocation. Their first-order cost is too low by 1.5 to
2.9 (measured on the bundled model at 2 bits, gate and up replaced alone) because it ignores that a
neuron's error is largest on the tokens that excite it, and that errors of neurons add up coherently."""

DROP_WEIGHT = 2.5
"""A dropped gate or up row costs this much more again: its error is the row itself, so it always
points along what excites the neuron. KL to full precision of the bundled model at 2 bits (32,768
calibration tokens): 0.0334 at 1, 0.0303 at 1.5, 0.0287 at 2.5, 0.0288 at 4."""

_TRIAL_EXPERTS = 8
_REFIT_RIDGE = 0.003


@dataclass(frozen=True)
class LayerPlan:
    """Attributes:
    costs: ``[3, E, r, widths]`` float32, estimated output error of each row at each width.
    bases: quantized, to be reused when the layer is rounded.
    correction: measured over estimated error of a trial rounding; already inside ``costs``.
    """

    costs: Tensor
    bases: SharedBases
    correction: float


@dataclass(frozen=True)
class RoundedExperts:
    """Some experts after rounding.

    Attributes:
        codes: ``[3, e, r, padded(I)]`` int32, see ``coding``.
        scale_codes: ``[3, e, r]`` uint8.
        values: ``[3, e, r, I]`` float32, the decoded factors.
        scale_grid: of gate, up and down, ``[3, r]``.
    """

    codes: Tensor
    scale_codes: Tensor
    values: Tensor
    scale_grid: rounding.ScaleGrid


def row_costs(problem: LayerProblem) -> Tensor:
    """``[3, E, r, widths]`` float32: first-order output error of every row at every width."""
    widths = problem.config.widths
    shape = problem.shape
    costs = torch.empty(3, shape.num_experts, shape.rank, len(widths))
    reach = problem.output_basis.square().sum(0)
    for chosen in problem.chunks(shape.num_experts):
        experts = range(chosen.start, chosen.stop)
        rank_weights = rounding.conditional_variance(rank_feedback(problem, experts))
        moments = problem.statistics.hidden_moment[chosen]
        hidden_weights = rounding.conditional_variance(error_feedback(moments, problem.config))
        for factor in range(3):
            rows = problem.factors[factor, chosen]
            if factor < 2:
                inner = problem.statistics.neuron_weights[factor, chosen, None]
                outer = rank_weights[factor] * GATE_UP_WEIGHT
            else:
                inner, outer = hidden_weights[:, None], reach
            for index, width in enumerate(widths):
                extra = DROP_WEIGHT if factor < 2 and width == 0 else 1.0
                distortion = grids.best_scale(rows, inner, width)[1]
                gain = coding.expected_gain(width, problem.config.grid)
                costs[factor, chosen, :, index] = distortion * outer * (extra * gain)
    return costs


def row_sizes(shape: LayerShape, widths: tuple[int, ...]) -> list[int]:
    """Payload bits of one row at each width."""
    return [shape.blocks * packing.BLOCK * width for width in widths]


def plan_layer(problem: LayerProblem, payload_bits: int) -> LayerPlan:
    """Costs of a layer, corrected by a trial rounding of some of its experts.

    The first-order estimate ranks rows well, but its sum is off by a factor that differs between
    layers. The trial measures it: allocate the layer alone, round, compare.

    Args:
        payload_bits: the layer's share of the budget, for the trial.
    """
    costs, widths = row_costs(problem), problem.config.widths
    sizes = torch.tensor(row_sizes(problem.shape, widths)).expand(costs.shape)
    flat = costs.reshape(-1, len(widths)).double().numpy()
    least = int(sizes.amin(-1).sum())
    trial = allocate(flat, sizes.reshape(-1, len(widths)).numpy(), max(payload_bits, least))
    choice = torch.from_numpy(trial.choice).view(costs.shape[:-1])
    stride = max(1, problem.shape.num_experts // _TRIAL_EXPERTS)
    experts = list(range(0, problem.shape.num_experts, stride))
    bits = torch.tensor(widths)[choice[:, experts]]
    rounded = round_experts(problem, bits, experts)
    estimated = costs[:, experts].gather(-1, choice[:, experts, :, None]).sum()
    measured = sampled_error(problem, experts, rounded.values)
    correction = measured / float(estimated) if float(estimated) > 0 and measured > 0 else 1.0
    return LayerPlan(costs * correction, problem.bases, correction)


def round_experts(problem: LayerProblem, bits: Tensor, experts: list[int]) -> RoundedExperts:
    """Round some experts at given widths.

    Args:
        bits: ``[3, e, r]`` int64.
        experts: their ids.
    """
    factors, grid = problem.factors[:, experts], problem.config.grid
    size = problem.shape.intermediate_size
    codes = torch.empty(*bits.shape, coding.padded(size), dtype=torch.int32)
    scale_codes = torch.empty(bits.shape, dtype=torch.uint8)
    values = torch.empty_like(factors)
    neuron = problem.statistics.neuron_weights[:, experts]
    scales = rounding.unbiased_scales(factors[:2], neuron[:, :, None], bits[:2], grid)
    rank_grid = rounding.ScaleGrid.covering(scales, bits[:2] > 0)
    for part in problem.chunks(len(experts)):
        feedback = rank_feedback(problem, experts[part])
        codes[:2, part], scale_codes[:2, part], values[:2, part] = rounding.round_along_rank(
            factors[:2, part], bits[:2, part], feedback, neuron[:, part], rank_grid, scales[:, part], grid
        )
    down, moments = refit_down(problem, values[:2], experts)
    feedback = error_feedback(moments, problem.config)
    inner = rounding.conditional_variance(feedback)[:, None]
    free = rounding.best_scales(down, inner, bits[2], grid)
    neuron_grid = rounding.ScaleGrid.covering(free, bits[2] > 0)
    codes[2], scale_codes[2], values[2] = rounding.round_along_neurons(
        down, bits[2], feedback, neuron_grid, free, grid
    )
    return RoundedExperts(codes, scale_codes, values, rank_grid.stacked_with(neuron_grid))


def _expert_hidden(problem: LayerProblem, expert: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Exact and rounded hidden activations ``[n, I]`` of an expert on its calibration rows.

    Args:
        values: ``[2, r, I]``, decoded gate and up.
    """
    x = problem.activations.hidden[problem.rows[expert].tokens].float()
    gate, up = problem.weights.gate[expert].float(), problem.weights.up[expert].float()
    z = x @ problem.input_basis.T
    return problem.gating(x @ gate.T, x @ up.T), problem.gating(z @ values[0], z @ values[1])


def refit_down(problem: LayerProblem, values: Tensor, experts: list[int]) -> tuple[Tensor, Tensor]:
    """Down factors that fit the exact outputs from the rounded hidden activations.

    Ridge regression towards the exact factor F: with h the exact and h' the rounded activations,
    F' = (F E[a h h'^T] + l F)(E[a h' h'^T] + l I)^-1, blended with F by tokens per neuron.

    Args:
        values: ``[2, e, r, I]``, decoded gate and up.

    Returns:
        factors ``[e, r, I]`` and second moments E[a h' h'^T] ``[e, I, I]`` to round them with.
    """
    down = problem.factors[2, experts].clone()
    moments = problem.statistics.hidden_moment[experts].clone()
    if not problem.config.refit:
        return down, moments
    size, h = problem.shape.intermediate_size, problem.shape.hidden_size
    for i, expert in enumerate(experts):
        exact, rounded = _expert_hidden(problem, expert, values[:, i])
        a = problem.rows[expert].weights[:, None] / h
        own, cross = (a * rounded).T @ rounded, (a * exact).T @ rounded
        ridge = _REFIT_RIDGE * own.diagonal().mean().clamp_min(1e-30) * torch.eye(size)
        fitted = torch.linalg.solve(own + ridge, (down[i] @ (cross + ridge)).T).T
        routed = problem.rows[expert].routed
        down[i] += routed / (routed + 2 * size) * (fitted - down[i])
        moments[i] = own
    return down, moments


def sampled_error(problem: LayerProblem, experts: list[int], values: Tensor) -> float:
    """Share of some experts in the layer's output error, errors of different experts included.

    A token's experts err in related ways, so their errors add up to more than the sum of squares.
    Of the pairs of experts a sample of n out of E holds n (n - 1) / (E (E - 1)), of the experts n / E;
    the cross terms are scaled up by the ratio.

    Args:
        values: ``[3, e, r, I]``, decoded factors of ``experts``.
    """
    shape, acts = problem.shape, problem.activations
    total = torch.zeros(acts.hidden.shape[0], shape.hidden_size)
    alone = routed_alone = 0.0
    for i, expert in enumerate(experts):
        rows = problem.rows[expert]
        exact, rounded = _expert_hidden(problem, expert, values[:2, i])
        down = problem.weights.down[expert].float()
        error = exact @ down.T - rounded @ values[2, i].T @ problem.output_basis.T
        squares = error.square().mean(-1) * rows.weights
        alone += float(squares.sum())
        routed_alone += float(squares[: rows.routed].sum())
        tokens = rows.tokens[: rows.routed]
        total.index_add_(0, tokens, error[: rows.routed] * acts.top_k_weights[tokens, rows.slots, None])
    together = float((total.square().mean(-1) * acts.token_weights).mean())
    pairs = (shape.num_experts - 1) / max(len(experts) - 1, 1)
    return alone + (together - routed_alone) * pairs


def round_layer(problem: LayerProblem, row_bits: Tensor) -> PackedExperts:
    """Round all experts at the allocated widths and pack them.

    Args:
        row_bits: ``[3, E, r]`` int64.
    """
    widths = problem.config.widths
    rounded = round_experts(problem, row_bits, list(range(problem.shape.num_experts)))
    words = [
        packing.pack_expert(rounded.codes[factor, expert], row_bits[factor, expert], widths)
        for factor in range(3)
        for expert in range(problem.shape.num_experts)
    ]
    input_basis, input_scales = packing.pack_basis(problem.bases.input_basis)
    output_basis, output_scales = packing.pack_basis(problem.bases.output_basis)
    return PackedExperts(
        row_codes=packing.pack_row_codes(row_bits, rounded.scale_codes, widths),
        scale_grid=packing.pack_scale_grid(rounded.scale_grid),
        payload=torch.cat(words),
        input_basis=input_basis,
        input_scales=input_scales,
        output_basis=output_basis,
        output_scales=output_scales,
    )
