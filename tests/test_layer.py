"""One layer, from weights to packed tensors to outputs, against dense arithmetic in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bitsmoe_plugin import packing
from bitsmoe_plugin.checkpoint import tensor_digest
from bitsmoe_plugin.config import ALL_WIDTHS, BitsMoEConfig
from bitsmoe_plugin.experts import BitsMoEExperts, PackedSpec
from bitsmoe_plugin.layer import (
    plan_layer,
    round_experts,
    round_layer,
    row_costs,
    sampled_error,
)
from bitsmoe_plugin.packing import PackedExperts
from bitsmoe_plugin.problem import LayerProblem, build_problem
from bitsmoe_plugin.spectral import ExpertWeights
from bitsmoe_plugin.statistics import PRIOR_TOKENS

E, SIZE, H, T = 6, 40, 64, 500


class Gated(nn.Module):
    """Stands in for the module that packed experts replace: they use its gating."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


@pytest.fixture(scope="module")
def layer(make_layer):
    return make_layer(E, SIZE, H, T)


def problem_of(layer, **options) -> LayerProblem:
    config = BitsMoEConfig(**options)
    return build_problem("layer", layer.weights, layer.activations, layer.gating, config)


def mixed_widths(seed: int = 0) -> Tensor:
    """Random widths; nothing is left of expert 1."""
    row_bits = torch.tensor(ALL_WIDTHS)[
        torch.randint(8, (3, E, H), generator=torch.Generator().manual_seed(seed))
    ]
    row_bits[:, 1] = 0
    return row_bits


def runtime(packed: PackedExperts, problem: LayerProblem) -> BitsMoEExperts:
    config = problem.config
    spec = PackedSpec(
        problem.shape, config.widths, config.basis_bits, config.basis_group_size, packed.payload.numel()
    )
    module = BitsMoEExperts(Gated(), spec)
    module.load_packed(packed)
    module.verify("layer")
    return module


def routing(layer) -> tuple[Tensor, Tensor, Tensor]:
    a = layer.activations
    return a.hidden, a.top_k_index, a.top_k_weights


def dense_factors(packed: PackedExperts, problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Dequantized factors ``[3, E, r, I]`` with zeros for dropped rows, and half a step of each row."""
    widths, shape = problem.config.widths, problem.shape
    index = packing.index_rows(packed.row_codes, widths, shape)
    scales = packing.row_scales(packed.row_codes, packed.scale_grid)
    factors = torch.zeros(3, shape.num_experts, shape.rank, shape.intermediate_size, dtype=torch.double)
    for f in range(3):
        for e in range(shape.num_experts):
            rows, order = packing.unpack_rows(packed.payload, index, scales, f, e, shape.intermediate_size)
            factors[f, e, order] = rows.double()
    return factors, scales.double() * 12.6 / 65536 / 2


def dequantized(packed: PackedExperts, problem: LayerProblem) -> ExpertWeights:
    """Dense weights that the packed tensors stand for."""
    factors, _ = dense_factors(packed, problem)
    read, write = problem.input_basis.double(), problem.output_basis.double()
    return ExpertWeights(
        factors[0].transpose(1, 2) @ read, factors[1].transpose(1, 2) @ read, write @ factors[2]
    )


@pytest.mark.parametrize("basis_bits", [4, 8, 16])
def test_packed_forward_is_the_dense_forward_of_the_dequantized_weights(layer, basis_bits: int) -> None:
    """Guards the runtime: row order, offsets, bases, routing weights. float32 sums: 1e-5."""
    problem = problem_of(layer, basis_bits=basis_bits)
    packed = round_layer(problem, mixed_widths())
    dense = replace(layer, weights=dequantized(packed, problem)).forward(*routing(layer))
    out = runtime(packed, problem)(*routing(layer))
    assert float((out - dense).norm() / dense.norm()) < 1e-5
    assert bool((layer.activations.top_k_index == 1).any()), "the dropped expert is never called"


def sixteen_bit_bound(layer, packed: PackedExperts, problem: LayerProblem) -> Tensor:
    """Largest possible output error ``[T, H]`` if each factor is off by at most ``error``.

    Per value half a step of the 16-bit grid, or what lies beyond its end: the stored scale may
    fall short of the row by the rounding of the scale grid. |silu'| < 1.1.
    """
    exact = problem.factors.double()
    half_step = dense_factors(packed, problem)[1][..., None]
    error = torch.maximum(half_step.expand_as(exact), exact.abs() - 65535 * half_step)
    assert float(error.norm() / exact.norm()) < 1e-4, "the ends of the grid cut off more than its steps"
    bound = torch.zeros(T, H, dtype=torch.double)
    hidden, index, weights = routing(layer)
    for t, slot in torch.cartesian_prod(torch.arange(T), torch.arange(2)).tolist():
        e, z = int(index[t, slot]), problem.input_basis.double() @ hidden[t].double()
        gate, up = z @ exact[0, e], z @ exact[1, e]
        off_gate, off_up = 1.1 * (z.abs() @ error[0, e]), z.abs() @ error[1, e]
        gated = nn.functional.silu(gate).abs()
        off_hidden = off_gate * (up.abs() + off_up) + gated * off_up
        off = exact[2, e].abs() @ off_hidden + error[2, e] @ (gated * up.abs() + off_hidden)
        bound[t] += float(weights[t, slot]) * (problem.output_basis.double().abs() @ off)
    return bound


def test_sixteen_bits_everywhere_reproduce_the_layer_within_the_bound(layer) -> None:
    """Guards the whole chain against losing a row, a sign or a scale anywhere. Without feedback
    and refit, which move values on purpose. float32 adds 1e-5 of the output's size."""
    problem = problem_of(layer, widths=(16,), bits=16, feedback=False, refit=False)
    packed = round_layer(problem, torch.full((3, E, H), 16))
    exact = layer.forward(*routing(layer))
    error = (runtime(packed, problem)(*routing(layer)) - exact).abs()
    bound = sixteen_bit_bound(layer, packed, problem)
    assert bool((error <= bound + 1e-5 * exact.abs().max()).all())
    assert float(bound.norm() / exact.norm()) < 0.02, "the bound says nothing"


def test_sixteen_bits_with_all_options_reproduce_the_layer(layer) -> None:
    """Feedback and refit must not add error where there is none to correct: steps of 2**-15 of
    each row's range give 3e-5 per factor; three factors and the metric's condition make 1e-3."""
    problem = problem_of(layer, widths=(16,), bits=16)
    packed = round_layer(problem, torch.full((3, E, H), 16))
    exact = layer.forward(*routing(layer))
    assert float((runtime(packed, problem)(*routing(layer)) - exact).norm() / exact.norm()) < 1e-3


def test_experts_can_be_stored_in_another_order(layer) -> None:
    """Guards expert parallelism: permuted experts with permuted routing give the same output.
    Only the order of float32 sums differs."""
    problem = problem_of(layer)
    row_bits = mixed_widths(1)
    packed = round_layer(problem, row_bits)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    index = packing.index_rows(packed.row_codes, ALL_WIDTHS, problem.shape)
    ends = [*[s for starts in index.starts for s in starts], index.words]
    pieces = [packed.payload[a:b] for a, b in pairwise(ends)]
    moved = replace(
        packed,
        row_codes=packed.row_codes[:, order],
        payload=torch.cat([pieces[f * E + e] for f in range(3) for e in order.tolist()]),
    )
    hidden, top_k_index, top_k_weights = routing(layer)
    out = runtime(packed, problem)(hidden, top_k_index, top_k_weights)
    again = runtime(moved, problem)(hidden, order.argsort()[top_k_index], top_k_weights)
    assert float((again - out).norm() / out.norm()) < 1e-6


def test_slots_that_point_nowhere_add_nothing(layer) -> None:
    """Ids from num_experts on (experts of another device) must be skipped, not wrapped around."""
    problem = problem_of(layer)
    module = runtime(round_layer(problem, mixed_widths()), problem)
    hidden, index, weights = routing(layer)
    elsewhere = module(hidden, torch.where(index == 3, E, index), weights)
    silenced = module(hidden, index, torch.where(index == 3, 0.0, weights))
    torch.testing.assert_close(elsewhere, silenced)


def test_same_input_same_bytes(layer) -> None:
    """Guards the promise of determinism, stand-in tokens and allocation included."""
    digests = set()
    for _ in range(2):
        problem = problem_of(layer)
        plan = plan_layer(problem, 2 * problem.shape.weights)
        row_bits = torch.tensor(ALL_WIDTHS)[plan.costs.argmin(-1).clamp_max(4)]
        digests.add((tensor_digest(round_layer(problem, row_bits)), plan.costs.numpy().tobytes()))
    assert len(digests) == 1


def test_costs_fall_with_the_width(layer) -> None:
    """Guards the surrogate: a wider row never costs more, and 16 bits cost next to nothing."""
    costs = row_costs(problem_of(layer))
    assert bool((costs.diff(dim=-1) <= 0).all())
    assert bool((costs > 0).all())
    assert float(costs[..., -1].sum() / costs[..., 0].sum()) < 1e-6


def test_trial_measures_the_error_of_the_layer(layer) -> None:
    """Guards the plan's correction: with all experts in the trial, and no stand-in tokens, its
    error is E[omega |y - y'|^2 / H] of the packed layer. float32 sums: 1e-3. The experts are alike,
    so that their errors add up to far more than the sum of the squares."""
    alike = {name: weight[:1].expand_as(weight) for name, weight in vars(layer.weights).items()}
    layer = replace(layer, weights=ExpertWeights(**alike))
    problem = problem_of(layer)
    assert all(rows.routed >= PRIOR_TOKENS for rows in problem.rows)
    row_bits = torch.full((3, E, H), 2)
    trial = sampled_error(problem, list(range(E)), round_experts(problem, row_bits, list(range(E))).values)
    out = runtime(round_layer(problem, row_bits), problem)(*routing(layer))
    error = (out - layer.forward(*routing(layer))).square().mean(-1)
    assert trial == pytest.approx(float((error * layer.activations.token_weights).mean()), rel=1e-3)


@pytest.mark.parametrize("option", ["feedback", "refit"])
def test_each_step_lowers_the_error(layer, option: str) -> None:
    """Guards against a step that does nothing or does harm: at 2 bits, on the calibration inputs."""
    exact, errors = layer.forward(*routing(layer)), []
    for switch in (True, False):
        problem = problem_of(layer, **{option: switch})
        packed = round_layer(problem, torch.full((3, E, H), 2))
        errors.append(float((runtime(packed, problem)(*routing(layer)) - exact).norm()))
    assert errors[0] < 0.97 * errors[1]


def test_unrouted_expert_is_rounded_like_the_others(layer) -> None:
    """Calibration never reached expert 5: its weights are kept about as well, not dropped."""
    index = layer.activations.top_k_index
    activations = replace(layer.activations, top_k_index=torch.where(index == 5, 4, index))
    problem = problem_of(replace(layer, activations=activations))
    costs = row_costs(problem)
    assert bool(torch.isfinite(costs).all())
    dropped = costs[..., 0].sum((0, 2))
    assert float(dropped[5]) > 0.25 * float(dropped[:5].median())
    weights = dequantized(round_layer(problem, torch.full((3, E, H), 4)), problem)
    assert float((weights.gate[5] - layer.weights.gate[5]).norm() / layer.weights.gate[5].norm()) < 0.3
