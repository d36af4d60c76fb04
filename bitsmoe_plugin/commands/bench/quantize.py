"""``bench quantize``: time to quantize one layer of a known model's shape, part by part, against GPTQ.

Weights and inputs are random, with spectra that fall as a power law: for time, not for quality. GPTQ
(gptqmodel, if it is installed) quantizes some of the experts from the same tokens; its time per expert
does not depend on how many there are, so it is scaled up to all.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmoe_plugin.allocation.budget import plan_budget
from bitsmoe_plugin.allocation.knapsack.solve import allocate
from bitsmoe_plugin.base.devices import choose_device
from bitsmoe_plugin.base.spans import recorded
from bitsmoe_plugin.calibration.activations import LayerActivations, routed_slots
from bitsmoe_plugin.codec.backends import refuse_slow
from bitsmoe_plugin.codec.layout import LayerShape, row_sizes
from bitsmoe_plugin.commands.bench.output import Row
from bitsmoe_plugin.commands.defaults import SHAPES
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.pipeline.layer_plan import plan_layer
from bitsmoe_plugin.rounding import layer_rounding, round_from_plan
from bitsmoe_plugin.spectral import layer_problem


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
    shape = weights.shape
    budget = plan_budget([shape], config).payload_bits
    first = layer_problem.build_problem("layer", weights, activations, _gating, config)
    plan = plan_layer(first, budget)
    del first
    costs = plan.costs.view(-1, len(config.widths)).numpy()
    result = allocate([costs], [row_sizes(shape, config.widths)], budget)
    bits = torch.tensor(config.widths)[torch.from_numpy(result.choice).long()].view(plan.costs.shape[:-1])
    if plan.row_weights is not None:
        known, device = plan.row_weights, activations.hidden.device
        round_from_plan.round_as_planned(
            weights, bits, plan.bases, plan.energies, known, config, device=device
        )
    else:
        second = layer_problem.build_problem("layer", weights, activations, _gating, config, plan.bases)
        layer_rounding.round_layer(second, bits)


def _now(device: torch.device) -> float:
    """Seconds, when all that a GPU was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _gptq_seconds(weights: ExpertWeights, activations: LayerActivations, experts: int, search: bool) -> float:
    """Time of gptqmodel for some experts, with the settings of ``compare.gptq_quantize``.

    Args:
        search: for scales, as there: the best quality, and most of the time. gptqmodel's default is not to.
    """
    from gptqmodel.quantization.gptq import GPTQ

    from bitsmoe_plugin.commands.compare.gptq_quantize import GptqSettings, quantize_config

    device = weights.up.device
    settings = GptqSettings() if search else GptqSettings(mse=0.0)

    slots = routed_slots(activations, weights.num_experts)
    total = 0.0
    for expert in range(experts):
        x = activations.hidden[slots[expert][0]]
        first = [matrix[expert] for matrix in weights.inputs]
        hidden = _gating(*(x @ weight.T for weight in first))
        for weight, inputs in (*((weight, x) for weight in first), (weights.down[expert], hidden)):
            sizes = weight.shape[1], weight.shape[0]
            linear = torch.nn.Linear(*sizes, bias=False, dtype=weight.dtype, device=device)
            linear.weight.data.copy_(weight)
            task = GPTQ(linear, quantize_config(settings))
            task.quantizer.configure(perchannel=True)
            start = _now(device)
            task.add_batch(inputs[None], None)
            task.quantize()
            total += _now(device) - start
    return total


def _first(weights: ExpertWeights) -> ExpertWeights:
    """The first two experts."""
    return ExpertWeights.of([matrix[:2] for matrix in weights.inputs], weights.down[:2])


def _routed_to_first(activations: LayerActivations) -> LayerActivations:
    """The same tokens, routed to two experts."""
    return replace(activations, top_k_index=activations.top_k_index % 2)


def _ours(weights: ExpertWeights, activations: LayerActivations, config: BitsMoEConfig) -> dict[str, float]:
    """Seconds of all of it, first, and of its parts, the longest first."""
    device, parts = activations.hidden.device, dict[str, float]()
    start = _now(device)
    with recorded(parts, device):
        _quantize(weights, activations, config)
    total = _now(device) - start
    parts["everything else"] = total - sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return {f"bitsmoe ({config.method})": total, **{f"  {part}": seconds for part, seconds in ordered}}


def _gptq(weights: ExpertWeights, activations: LayerActivations, experts: int) -> dict[str, float]:
    """Seconds of GPTQ for all experts, from some."""
    some = min(experts, weights.num_experts)
    scale = weights.num_experts / some
    names = {"gptq": True, "gptq, no search for scales": False}
    return {name: scale * _gptq_seconds(weights, activations, some, s) for name, s in names.items()}


def measure(args: argparse.Namespace) -> list[Row]:
    """For each number of tokens a row for the whole, each part, and GPTQ; ``growth`` is relative to the first
    number."""
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes, k = SHAPES[args.shape]
    shape = LayerShape(args.experts or sizes[0], *sizes[1:])
    generator = torch.Generator().manual_seed(0)
    device = torch.device(choose_device(args.device))
    config = BitsMoEConfig(bits=args.bits, method=args.method)
    refuse_slow(device, args.allow_slow)
    weights = random_experts(shape, generator).to(device)
    plenty = BitsMoEConfig(bits=8.0, method=args.method)  # two experts have much of a basis each
    peer = bool(args.gptq_experts and find_spec("gptqmodel"))
    times: dict[int, dict[str, float]] = {}
    for tokens in args.tokens:
        given = random_activations(shape, min(k, shape.num_experts), tokens, generator)
        activations = LayerActivations(*(tensor.to(device) for tensor in vars(given).values()))
        with torch.no_grad():
            if device.type == "cuda" and not times:  # kernels are compiled, libraries loaded, at first use
                _quantize(_first(weights), _routed_to_first(activations), plenty)
                if peer:
                    _gptq_seconds(weights, activations, 1, search=True)
            times[tokens] = _ours(weights, activations, config)
            if peer:
                times[tokens] |= _gptq(weights, activations, args.gptq_experts)
    return _rows(times, shape)


def _rows(times: dict[int, dict[str, float]], shape: LayerShape) -> list[Row]:
    first = next(iter(times.values()))
    return [
        {
            "tokens": tokens,
            "part": part,
            "seconds": seconds,
            "nanoseconds_per_weight": 1e9 * seconds / shape.weights,
            "over_bitsmoe": seconds / next(iter(parts.values())),
            "growth": seconds / first[part] if first.get(part) else None,
        }
        for tokens, parts in times.items()
        for part, seconds in parts.items()
    ]
