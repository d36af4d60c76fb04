"""Quantization of one MoE layer: what its rows would cost, and rounding them at chosen widths.

This is the numerical heart that the pipeline calls twice per layer: ``plan_layer`` before the
allocation, ``round_layer`` after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin import bound, coding, grids, packing, rounding, spectral
from bitsmoe_plugin.allocation import allocate
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.devices import computing_on
from bitsmoe_plugin.memory import release_free_memory
from bitsmoe_plugin.packing import LayerShape, PackedExperts
from bitsmoe_plugin.problem import LayerProblem, feedback_of, rank_feedback, rank_variances
from bitsmoe_plugin.products import product, weighted_products
from bitsmoe_plugin.rounding import Feedback, ScaleGrid
from bitsmoe_plugin.spectral import Experts, SharedBases
from bitsmoe_plugin.workers import ALONE, Workers

GATE_UP_WEIGHT = 2.0
"""Gate and up errors count double in the allocation. Their first-order cost is too low by 1.5 to
2.9 (measured on the bundled model at 2 bits, gate and up replaced alone) because it ignores that a
neuron's error is largest on the tokens that excite it, and that errors of neurons add up coherently."""

DROP_WEIGHT = 2.5
"""A dropped gate or up row costs this much more again: its error is the row itself, so it always
points along what excites the neuron. KL to full precision of the bundled model at 2 bits (32,768
calibration tokens): 0.0334 at 1, 0.0303 at 1.5, 0.0287 at 2.5, 0.0288 at 4."""

_TRIAL_EXPERTS = 8
_ENERGY_NEURONS = 256
"""Neurons of an expert, evenly spaced, that energies are learnt from where rows are taken for Gaussian. Of as
many as this, their standard deviation is 9 %, which the choice among neighbouring scales makes up for."""
_REFIT_RIDGE = 0.003


@dataclass(frozen=True)
class RowWeights:
    """What a unit of squared error in a factor's values costs at the layer's output, to first order.

    Attributes:
        neuron: ``[2, E, I]`` float32, of gate and up: importance of each neuron.
        hidden: ``[E, I]`` float32, variances of the hidden activations that down is multiplied with.
        rank: ``[1 or 2, E, r]`` float32, variances of what gate and up are multiplied with.
    """

    neuron: Tensor
    hidden: Tensor
    rank: Tensor

    def to(self, device: torch.device) -> RowWeights:
        """The same on a device."""
        return RowWeights(self.neuron.to(device), self.hidden.to(device), self.rank.to(device))

    def of(self, chosen: Experts, output_basis: Tensor) -> tuple[Tensor, Tensor]:
        """For gate, up and down the weights within a row, ``[3, e, I]``, and of whole rows, ``[3, e, r]``.

        Args:
            output_basis: ``[H, r]``.
        """
        rank = self.rank[:, chosen]
        reach = output_basis.square().sum(0).expand(rank.shape[1], -1)
        return (
            torch.cat([self.neuron[:, chosen], self.hidden[None, chosen]]),
            torch.stack([rank[0], rank[-1], reach]),
        )


@dataclass(frozen=True)
class LayerPlan:
    """Attributes:
    costs: ``[3, E, r, widths]`` float32, estimated output error of each row at each width. This and all
        else is on the CPU.
    energies: ``[3, E, r]`` float32, first-order output error of dropping each row.
    bases: quantized, to be reused when the layer is rounded.
    correction: measured over estimated error of a trial rounding; already inside ``costs``.
    output_energy: of the layer, see ``statistics.LayerStatistics``.
    row_weights: if rounding needs no more than the plan, see ``rounds_as_planned``.
    """

    costs: Tensor
    energies: Tensor
    bases: SharedBases
    correction: float
    output_energy: float
    row_weights: RowWeights | None = None


def rounds_as_planned(config: BitsMoEConfig) -> bool:
    """Whether nothing that is found out after planning changes how rows are rounded: they are taken for
    Gaussian, so that energies tell scales, and neither follow each other nor what earlier layers put out."""
    return config.cost == "model" and not (config.feedback or config.refit or config.sequential)


@dataclass(frozen=True)
class RoundedExperts:
    """Some experts after rounding; first axis: gate, up, down.

    Attributes:
        words: payload of each ``[3][e]``, on the CPU.
        scale_codes: ``[3, e, r]`` uint8.
        errors: ``[3, e, r]`` float32, see ``rounding.RoundedRows``.
        values: ``[3, e, r, I]`` float32, what is stored; None unless asked for.
    """

    words: list[list[Tensor]]
    scale_codes: Tensor
    errors: Tensor
    values: Tensor | None

    @staticmethod
    def of(
        rows: rounding.RoundedRows, bits: Tensor, widths: tuple[int, ...], with_values: bool
    ) -> RoundedExperts:
        """Packed rows of some factors ``[factors, e, r, ...]`` at ``bits`` alike."""
        words = [
            packing.pack_experts(codes, width, widths) for codes, width in zip(rows.codes, bits, strict=True)
        ]
        return RoundedExperts(words, rows.scale_codes, rows.errors, rows.values if with_values else None)

    def to(self, device: torch.device | str) -> RoundedExperts:
        """The same on a device, but for the words."""
        values = None if self.values is None else self.values.to(device)
        return RoundedExperts(self.words, self.scale_codes.to(device), self.errors.to(device), values)

    @staticmethod
    def of_all_factors(rank: RoundedExperts, down: RoundedExperts) -> RoundedExperts:
        """Gate and up, and down, as one."""
        return RoundedExperts(rank.words + down.words, *_joined([rank, down], 0))

    @staticmethod
    def of_all_experts(groups: list[RoundedExperts]) -> RoundedExperts:
        """One group of experts after the other."""
        words = [[word for group in groups for word in group.words[factor]] for factor in range(3)]
        return RoundedExperts(words, *_joined(groups, 1))


def _joined(parts: list[RoundedExperts], dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
    values = [part.values for part in parts if part.values is not None]
    return (
        torch.cat([part.scale_codes for part in parts], dim),
        torch.cat([part.errors for part in parts], dim),
        torch.cat(values, dim) if values else None,
    )


def row_weights(problem: LayerProblem, known: dict[int, Feedback]) -> RowWeights:
    """Those of the rows of a layer.

    Args:
        known: see ``rank_variances``.
    """
    statistics, config = problem.statistics, problem.config
    hidden = torch.cat(
        [
            feedback_of(statistics.hidden_moment[part], config).variance
            for part in problem.chunks(problem.shape.num_experts)
        ]
    )
    return RowWeights(statistics.neuron_weights, hidden, rank_variances(problem, known))


def _spectral_weights(problem: LayerProblem, chosen: slice) -> tuple[Tensor, Tensor]:
    """As ``RowWeights.of``, for ``cost="spectral"``: the energy of what the factor is multiplied with.

    ``row_costs`` takes errors relative to each projection's total, the only common unit there is.
    """
    energies = []
    for rows in problem.rows[chosen]:
        z = problem.z[:, rows.tokens]
        energies.append((z.square() * rows.weights[:, None]).sum(1))
    z_energy = torch.stack(energies, 1)
    moments = problem.statistics.hidden_moment[chosen]
    hidden = moments.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(-1, problem.shape.rank)
    ones = torch.ones(3, len(moments), problem.shape.intermediate_size)
    return ones, torch.stack([z_energy[0], z_energy[-1], hidden])


def row_costs(problem: LayerProblem, own: RowWeights | None = None) -> tuple[Tensor, Tensor]:
    """What the rows of a layer cost at every width.

    Args:
        own: weights of the rows; needed unless ``cost="spectral"``.

    Returns:
        costs ``[3, E, r, widths]`` and energies ``[3, E, r]`` float32: estimated output error of
        each row, and the first-order error of dropping it.
    """
    config, shape, size = problem.config, problem.shape, problem.shape.intermediate_size
    costs = torch.empty(3, shape.num_experts, shape.rank, len(config.widths))
    energies = torch.empty(3, shape.num_experts, shape.rank)
    stride = max(1, size // _ENERGY_NEURONS) if config.cost == "model" else 1
    seen = problem.weights.every(stride)
    for chosen in problem.chunks(shape.num_experts):
        if own is None:
            inner, outer = _spectral_weights(problem, chosen)
        else:
            inner, outer = own.of(chosen, problem.output_basis)
        inner = inner[:, :, None]
        factors = [
            *spectral.input_factors(seen, problem.inverses, chosen),
            spectral.down_factors(seen, problem.inverses, chosen),
        ]
        for factor, rows in enumerate(factors):
            energy = _energies(rows, inner[factor], stride) * outer[factor]
            energies[factor, chosen] = energy
            for index, width in enumerate(config.widths):
                if config.cost == "model":
                    distortion = energy * coding.gaussian_distortion(
                        width, config.grid, shape.intermediate_size
                    )
                else:
                    distortion = grids.best_scale(rows, inner[factor], width)[1] * outer[factor]
                    distortion *= coding.expected_gain(width, config.grid, size)
                if factor < 2 and own is not None:
                    distortion *= GATE_UP_WEIGHT * (DROP_WEIGHT if width == 0 else 1.0)
                costs[factor, chosen, :, index] = distortion
    if own is None:  # what a projection's factor is multiplied with has a unit of its own
        totals = energies.sum((1, 2), keepdim=True).clamp_min(1e-30)
        costs /= totals[..., None]
    return costs, energies


def _energies(rows: Tensor, weights: Tensor, stride: int) -> Tensor:
    """Weighted energies ``[e, r]`` of rows of which ``rows`` ``[e, r, n]`` has every ``stride``-th value.

    Args:
        weights: ``[e, 1, I]``, of all values.
    """
    own = weights[..., ::stride]
    energies = (rows.square() * own).sum(-1)
    return energies if stride == 1 else energies * (weights.sum(-1) / own.sum(-1).clamp_min(1e-30))


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
    cpu, energy, config = torch.device("cpu"), problem.statistics.output_energy, problem.config
    with computing_on(problem.device):
        weights, correction = None, 1.0
        if config.cost == "spectral":
            costs, energies = row_costs(problem)
        elif config.cost == "model":
            weights = row_weights(problem, _trial_feedback(problem))
            costs, energies = row_costs(problem, weights)
        else:
            costs, energies, correction = _corrected_costs(problem, payload_bits)
    kept = weights.to(cpu) if weights is not None and rounds_as_planned(config) else None
    return LayerPlan(costs.to(cpu), energies.to(cpu), problem.bases.to(cpu), correction, energy, kept)


def _trial_feedback(problem: LayerProblem) -> dict[int, Feedback]:
    """Feedback of some experts, evenly spaced, which tell what it does to the others'."""
    stride = max(1, problem.shape.num_experts // _TRIAL_EXPERTS)
    return {expert: rank_feedback(problem, expert) for expert in range(0, problem.shape.num_experts, stride)}


def _corrected_costs(problem: LayerProblem, payload_bits: int) -> tuple[Tensor, Tensor, float]:
    """Costs times the correction, energies, and the correction of a plan."""
    widths, feedback = problem.config.widths, _trial_feedback(problem)
    experts = list(feedback)
    costs, energies = row_costs(problem, row_weights(problem, feedback))
    sizes = row_sizes(problem.shape, widths)
    least = costs.shape[:-1].numel() * sizes[0]
    trial = allocate([costs.view(-1, len(widths)).cpu().numpy()], [sizes], max(payload_bits, least))
    choice = torch.from_numpy(trial.choice).to(costs.device).long().view(costs.shape[:-1])
    bits = torch.tensor(widths)[choice[:, experts]]
    rounded, _ = round_experts(problem, bits, experts, feedback, with_values=True)
    assert rounded.values is not None
    estimated = costs[:, experts].gather(-1, choice[:, experts, :, None]).sum()
    measured = sampled_error(problem, experts, rounded.values)
    correction = measured / float(estimated) if float(estimated) > 0 and measured > 0 else 1.0
    return costs * correction, energies, correction


def round_experts(
    problem: LayerProblem,
    bits: Tensor,
    experts: list[int],
    feedback: dict[int, Feedback] | None = None,
    with_values: bool = False,
    workers: Workers = ALONE,
) -> tuple[RoundedExperts, ScaleGrid]:
    """Round some experts at given widths, a group of bounded working set after the other.

    Args:
        bits: ``[3, e, r]`` int64.
        experts: their ids.
        feedback: of each, if known.
        with_values: also return what the codes stand for.
        workers: share the groups, and get all of them.

    Returns:
        the rows, and their scale grid ``[3, r]``.
    """
    config = problem.config
    groups = {i: part for i, part in enumerate(problem.chunks(len(experts))) if workers.takes(i)}
    own = {i: _input_scales(problem, bits[:2, part], experts[part]) for i, part in groups.items()}
    scales = _of_all(workers, own, problem.device)
    input_grid = ScaleGrid.covering(scales, bits[:2] > 0)
    first, waiting = {}, {}
    for i, part in groups.items():
        rows = rounding.round_along_rank(
            problem.input_factors(experts[part]),
            bits[:2, part],
            _stacked_feedback(problem, experts[part], feedback),
            problem.statistics.neuron_weights[:, experts[part]],
            input_grid,
            scales[:, part],
            config.grid,
        )
        first[i] = RoundedExperts.of(rows, bits[:2, part], config.widths, with_values)
        waiting[i] = _refitted(problem, rows.values, bits[2, part], experts[part])
        release_free_memory()
    # Down is refitted to gate and up, but the grid of its scales must be known before its first row.
    scales = _of_all(workers, {i: down.scales for i, down in waiting.items()}, problem.device)
    grid = ScaleGrid.covering(scales, bits[2] > 0)
    done = {}
    for i, part in groups.items():
        down = waiting.pop(i)
        given = down.factors, bits[2, part], down.feedback, grid, down.scales
        rows = rounding.stacked(rounding.round_along_neurons(*given, config.grid))
        last = RoundedExperts.of(rows, bits[2:, part], config.widths, with_values)
        done[i] = RoundedExperts.of_all_factors(first.pop(i), last)
    return merged_experts(done, workers, problem.device), input_grid.stacked_with(grid)


def merged_experts(
    groups: dict[int, RoundedExperts], workers: Workers, device: torch.device
) -> RoundedExperts:
    """All experts, from the groups that this one of the workers has rounded."""
    if workers.size > 1:
        groups = workers.merged({i: part.to("cpu") for i, part in groups.items()})
    return RoundedExperts.of_all_experts(list(groups.values())).to(device)


def _of_all(workers: Workers, scales: dict[int, Tensor], device: torch.device) -> Tensor:
    """Scales ``[..., e, r]`` of all groups from those of this process's."""
    if workers.size > 1:
        scales = workers.merged({i: part.cpu() for i, part in scales.items()})
    return torch.cat([part.to(device) for part in scales.values()], dim=-2)


def _input_scales(problem: LayerProblem, bits: Tensor, experts: list[int]) -> Tensor:
    """Scales ``[2, e, r]`` float32 of gate and up rows of ``bits`` alike."""
    choose = rounding.unbiased_scales if problem.config.widening else rounding.best_scales
    neuron = problem.statistics.neuron_weights[:, experts, None]
    return choose(problem.input_factors(experts), neuron, bits, problem.config.grid)


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


def _refitted(problem: LayerProblem, values: Tensor, bits: Tensor, experts: list[int]) -> _Down:
    """
    Args:
        values: ``[2, e, r, I]``, decoded gate and up.
        bits: ``[e, r]``, of down.
    """
    factors, moments = refit_down(problem, values, experts)
    feedback = feedback_of(moments, problem.config)
    scales = rounding.best_scales(factors, feedback.variance[:, None], bits, problem.config.grid)
    return _Down(factors, feedback, scales)


def _stacked_feedback(
    problem: LayerProblem, experts: list[int], known: dict[int, Feedback] | None
) -> Feedback:
    """Feedback of gate and up of some experts, ``[1 or 2, e]``."""
    found = [known[e] if known else rank_feedback(problem, e) for e in experts]
    return rounding.stacked_feedback(found, dim=1)


def _expert_hidden(problem: LayerProblem, expert: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Exact and rounded hidden activations ``[n, I]`` of an expert on its calibration rows.

    Args:
        values: ``[2, r, I]``, decoded gate and up.
    """
    tokens = problem.rows[expert].tokens
    x, z = problem.activations.hidden[tokens].float(), problem.z[:, tokens]
    gate, up = problem.weights.gate[expert].float(), problem.weights.up[expert].float()
    return (
        problem.hidden(product(x, gate), product(x, up), expert),
        problem.hidden(product(z[0], values[0].T), product(z[-1], values[1].T), expert),
    )


def refit_down(problem: LayerProblem, values: Tensor, experts: list[int]) -> tuple[Tensor, Tensor]:
    """Down factors that fit the wanted outputs from the rounded hidden activations.

    Ridge regression towards the exact factor F: with h the exact and h' the rounded activations and
    t what is wanted besides F h (see ``_missing_output``),
    F' = (E[a (F h + t) h'^T] + l F)(E[a h' h'^T] + l I)^-1, blended with F by tokens per neuron.

    Args:
        values: ``[2, e, r, I]``, decoded gate and up.

    Returns:
        factors ``[e, r, I]`` and second moments E[a h' h'^T] ``[e, I, I]`` to round them with.
    """
    down = problem.down_factors(experts)
    if not problem.config.refit:
        return down, problem.statistics.hidden_moment[experts]
    size, h = problem.shape.intermediate_size, problem.shape.hidden_size
    moments = torch.empty(len(experts), size, size)
    for i, expert in enumerate(experts):
        exact, rounded = _expert_hidden(problem, expert, values[:, i])
        a = problem.rows[expert].weights / h
        own, cross = weighted_products(rounded, rounded, a), weighted_products(exact, rounded, a)
        ridge = _REFIT_RIDGE * own.diagonal().mean().clamp_min(1e-30) * torch.eye(size)
        wanted = product(down[i], (cross + ridge).T)
        routed = problem.rows[expert].routed
        if problem.drift is not None:
            missing = _missing_output(problem, expert, problem.drift)
            wanted += weighted_products(missing, rounded[:routed], a[:routed])
        fitted = product(wanted, torch.cholesky_inverse(torch.linalg.cholesky(own + ridge)))
        down[i] += routed / (routed + 2 * size) * (fitted - down[i])
        moments[i] = own
    return down, moments


def _missing_output(problem: LayerProblem, expert: int, drift: Tensor) -> Tensor:
    """An expert's part ``[routed, r]`` in making up for what earlier layers lost at its tokens, ``[T, r]``.

    With p the router's weights of a token, drift * p / sum(p^2): the parts, weighted by p, add up
    to the whole drift. (GPTAQ, arXiv 2504.02692, aims at the unquantized model's outputs likewise.)
    """
    rows = problem.rows[expert]
    tokens = rows.tokens[: rows.routed]
    weights = problem.activations.top_k_weights[tokens]
    share = weights.gather(1, rows.slots[:, None]) / weights.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return drift[tokens] * share


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
        error = product(exact, down) - product(product(rounded, values[2, i]), problem.output_basis)
        squares = error.square().mean(-1) * rows.weights
        alone += float(squares.sum())
        routed_alone += float(squares[: rows.routed].sum())
        tokens = rows.tokens[: rows.routed]
        total.index_add_(0, tokens, error[: rows.routed] * acts.top_k_weights[tokens, rows.slots, None])
    together = float((total.square().mean(-1) * acts.token_weights).mean())
    pairs = (shape.num_experts - 1) / max(len(experts) - 1, 1)
    return alone + (together - routed_alone) * pairs


@dataclass(frozen=True)
class RoundedLayer:
    """Attributes:
    packed: the layer as it is stored.
    errors: ``[3, E]`` first-order output error of gate, up and down of each expert.
    """

    packed: PackedExperts
    errors: Tensor


def round_layer(problem: LayerProblem, row_bits: Tensor, workers: Workers = ALONE) -> RoundedLayer:
    """Round all experts at the allocated widths and pack them.

    Args:
        row_bits: ``[3, E, r]`` int64.
        workers: share the work; all must call this with the same arguments, and get the same.

    Returns:
        the layer, on the CPU.
    """
    everyone = list(range(problem.shape.num_experts))
    with computing_on(problem.device):
        row_bits = row_bits.to(problem.device)
        rounded, grid = round_experts(problem, row_bits, everyone, workers=workers)
        return pack_layer(rounded, grid, problem.bases, row_bits, problem.config.widths)


def pack_layer(
    rounded: RoundedExperts, grid: ScaleGrid, bases: SharedBases, row_bits: Tensor, widths: tuple[int, ...]
) -> RoundedLayer:
    """A layer of which all experts ``[3, E]`` are rounded, as it is stored: on the CPU."""
    input_basis, input_scales = packing.pack_basis(bases.input_basis)
    output_basis, output_scales = packing.pack_basis(bases.output_basis)
    packed = PackedExperts(
        row_codes=packing.pack_row_codes(row_bits, rounded.scale_codes, widths),
        scale_grid=packing.pack_scale_grid(grid),
        payload=torch.cat([words for factor in rounded.words for words in factor]),
        input_basis=input_basis,
        input_scales=input_scales,
        output_basis=output_basis,
        output_scales=output_scales,
    )
    errors = rounded.errors.sum(2)
    errors[2] = rounded.errors[2] @ bases.output_basis.dequantize().square().sum(0)
    return RoundedLayer(packed.cpu(), errors.cpu())


def bits_over_bound(
    plan: LayerPlan, rounded: RoundedLayer, shape: LayerShape, others: Tensor | None = None
) -> float:
    """Stored bits per weight of the rows beyond what the rate-distortion bound asks for.

    Both sides count the same first-order output error; the rows' bits are payload, row codes and
    scale grids, without the bases.

    Args:
        others: ``[E]`` bool, experts that have rows; default: all.
    """
    energies, errors = plan.energies, rounded.errors
    if others is not None:
        energies, errors = energies[:, others], errors[:, others]
    least = bound.water_filling_bits(energies, float(errors.sum()), shape.intermediate_size)
    stored = 32 * rounded.packed.payload.numel()
    for tensor in (rounded.packed.row_codes, rounded.packed.scale_grid):
        stored += 8 * tensor.numel() * tensor.element_size()
    return (stored - least) / shape.weights
