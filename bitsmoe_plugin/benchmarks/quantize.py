"""``bench quantize``: time to quantize one layer of a known model's shape, part by part, against GPTQ.

Weights and inputs are random, with spectra that fall as a power law: for time, not for quality. GPTQ
(gptqmodel, if it is installed) quantizes some of the experts from the same tokens; its time per expert
does not depend on how many there are, so it is scaled up to all.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmoe_plugin import layer, packing, problem, spectral, statistics
from bitsmoe_plugin.allocation import allocate
from bitsmoe_plugin.benchmarks.layer import SHAPES
from bitsmoe_plugin.benchmarks.output import Row, add_benchmark
from bitsmoe_plugin.budget import plan_budget
from bitsmoe_plugin.config import METHODS, BitsMoEConfig
from bitsmoe_plugin.packing import LayerShape
from bitsmoe_plugin.planned_rounding import round_as_planned
from bitsmoe_plugin.rounding import round_along_neurons, round_along_rank
from bitsmoe_plugin.spectral import ExpertWeights
from bitsmoe_plugin.statistics import LayerActivations

PARTS: dict[str, Callable[..., Any]] = {
    "statistics": statistics.collect,
    "bases": problem.shared_bases,
    "factors of gate and up": spectral.input_factors,
    "factors of down": spectral.down_factors,
    "feedback": problem.rank_feedback,
    "costs, with feedback": layer.row_costs,
    "allocation": allocate,
    "gate and up": round_along_rank,
    "refit of down": layer.refit_down,
    "down": round_along_neurons,
    "packing": packing.pack_expert,
}
"""What is timed; feedback is computed twice, once for the costs."""


def add(commands: Any) -> None:
    """``bench quantize``."""
    parser = add_benchmark(commands, "quantize", "quantizing one MoE layer, ours against GPTQ", measure)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(SHAPES))
    parser.add_argument("--experts", type=int, help="so many instead of the model's")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--method", default="default", choices=sorted(METHODS))
    parser.add_argument("--gptq-experts", type=int, default=2, help="experts that GPTQ quantizes; 0: no GPTQ")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")


def random_experts(shape: LayerShape, generator: torch.Generator) -> ExpertWeights:
    """bfloat16 weights; input dimensions fall in importance as a power law."""

    def matrix(rows: int, columns: int) -> Tensor:
        fall = torch.arange(1, columns + 1).float() ** -0.4
        scale = fall / (fall.square().mean() * columns).sqrt()
        draws = [
            (torch.randn(rows, columns, generator=generator) * scale).bfloat16()
            for _ in range(shape.num_experts)
        ]
        return torch.stack(draws)

    h, size = shape.hidden_size, shape.intermediate_size
    return ExpertWeights(matrix(size, h), matrix(size, h), matrix(h, size))


def random_activations(
    shape: LayerShape, k: int, tokens: int, generator: torch.Generator
) -> LayerActivations:
    """Inputs with channels of different size, routed at random."""
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator)
    hidden *= torch.rand(shape.hidden_size, generator=generator) * 2
    index = torch.rand(tokens, shape.num_experts, generator=generator).topk(k).indices
    weights = torch.full((tokens, k), 1 / k)
    return LayerActivations(hidden.bfloat16(), index, weights, torch.ones(tokens))


def _gating(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _quantize(weights: ExpertWeights, activations: LayerActivations, config: BitsMoEConfig) -> None:
    """What the pipeline does with a layer, in its two passes."""
    shape = LayerShape(weights.num_experts, weights.hidden_size, weights.intermediate_size)
    budget = plan_budget([shape], config).payload_bits
    first = problem.build_problem("layer", weights, activations, _gating, config)
    plan = layer.plan_layer(first, budget)
    del first
    costs = plan.costs.view(-1, len(config.widths)).numpy()
    result = allocate([costs], [layer.row_sizes(shape, config.widths)], budget)
    bits = torch.tensor(config.widths)[torch.from_numpy(result.choice).long()].view(plan.costs.shape[:-1])
    if plan.row_weights is not None:
        round_as_planned(weights, bits, plan, plan.row_weights, config)
    else:
        second = problem.build_problem("layer", weights, activations, _gating, config, plan.bases)
        layer.round_layer(second, bits)


def _seconds(stats: pstats.Stats, function: Callable[..., Any]) -> float:
    """Time in a function and what it called."""
    code = function.__code__
    times = stats.stats.get((code.co_filename, code.co_firstlineno, code.co_name))  # type: ignore[attr-defined]
    return times[3] if times else 0.0


def _gptq_seconds(weights: ExpertWeights, activations: LayerActivations, experts: int) -> float:
    """Time of gptqmodel for some experts, with the settings of ``comparison.gptq_quantize``."""
    from gptqmodel.quantization.gptq import GPTQ

    from bitsmoe_plugin.comparison.gptq_quantize import GptqSettings, quantize_config

    slots = statistics.routed_slots(activations, weights.num_experts)
    total = 0.0
    for expert in range(experts):
        x = activations.hidden[slots[expert][0]]
        gate, up, down = weights.gate[expert], weights.up[expert], weights.down[expert]
        hidden = _gating(x @ gate.T, x @ up.T)
        for weight, inputs in ((gate, x), (up, x), (down, hidden)):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight.data.copy_(weight)
            task = GPTQ(linear, quantize_config(GptqSettings()))
            task.quantizer.configure(perchannel=True)
            start = time.perf_counter()
            task.add_batch(inputs[None], None)
            task.quantize()
            total += time.perf_counter() - start
    return total


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each part, for the whole, and for GPTQ."""
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, k = SHAPES[args.shape]
    if args.experts:
        shape = LayerShape(args.experts, shape.hidden_size, shape.intermediate_size)
    generator = torch.Generator().manual_seed(0)
    weights = random_experts(shape, generator)
    activations = random_activations(shape, min(k, shape.num_experts), args.tokens, generator)
    profile = cProfile.Profile()
    start = time.perf_counter()
    with torch.no_grad():
        profile.runcall(_quantize, weights, activations, BitsMoEConfig(bits=args.bits, method=args.method))
    ours = time.perf_counter() - start
    stats = pstats.Stats(profile)
    times = {f"  {part}": _seconds(stats, function) for part, function in PARTS.items()}
    times = {f"bitsmoe ({args.method})": ours, **times}
    if args.gptq_experts and find_spec("gptqmodel"):
        some = min(args.gptq_experts, shape.num_experts)
        times["gptq"] = _gptq_seconds(weights, activations, some) * shape.num_experts / some
    return [
        {
            "part": part,
            "seconds": seconds,
            "nanoseconds_per_weight": 1e9 * seconds / shape.weights,
            "over_bitsmoe": seconds / ours,
        }
        for part, seconds in times.items()
    ]
