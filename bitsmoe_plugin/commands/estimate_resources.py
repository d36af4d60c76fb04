"""Memory and time that quantization takes, estimated from sizes alone.

Both describe quantization as ``bitsmoe quantize`` does it on the CPU: experts are read layer by layer, plans
and packed layers kept in files (whose mapped pages the kernel may take back; they are not counted).
Memory was up to 29 % more than what was measured, see ``peak_memory``; time is an order of magnitude.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch

from bitsmoe_plugin.base import native
from bitsmoe_plugin.base.devices import CPU_WORKING_SET
from bitsmoe_plugin.base.linalg import product
from bitsmoe_plugin.calibration.activations import enough
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.estimate_tuning import (
    layers_memory,
    model_memory,
    tuning_decoding,
    tuning_flops,
    tuning_memory,
)
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.pipeline.layer_plan import trial_experts
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings
from bitsmoe_plugin.rounding.kept_factors import kept_bytes
from bitsmoe_plugin.rounding.refit_down import REFIT_TOKENS
from bitsmoe_plugin.spectral.moments import COVARIANCE_TOKENS
from bitsmoe_plugin.spectral.statistics_tokens import FEWEST_MOMENT_TOKENS, MEAN_TOKENS, MOMENT_TOKENS

PROCESS_BYTES = 390 * 2**20
"""Python with torch and transformers, measured."""
_KERNEL_BYTES = 750_000
KERNELS = 96
"""Matrix products through oneDNN: it compiles a kernel for every shape, so in 16 bits for every number of
tokens that an expert is given, and keeps so many (the command line says so; 1024 otherwise). Measured in
16 bits: 0.67 MB per shape."""
_NEURON_VALUES = 9
"""Values in float32 per neuron and token while an expert's activations are computed."""
_SECONDS_PER_WEIGHT = 6e-7
"""Pricing, rounding and packing without their matrix products, one core with AVX-512 (``bench quantize``)."""
_WITHOUT_KERNELS = 20
"""How many times as long that takes in plain torch."""


@dataclass(frozen=True)
class Workload:
    """Attributes:
    shapes: of the MoE layers.
    tokens: calibration tokens.
    experts_per_token: of the router; None if it is unknown.
    other_bytes: all of the unquantized model but the routed experts.
    active_weights: weights outside the routed experts, each used once per token.
    itemsize: bytes per value of hidden states.
    vocab_size: logits of a token.
    """

    shapes: list[LayerShape]
    tokens: int
    experts_per_token: int | None
    other_bytes: int
    active_weights: int
    itemsize: int
    vocab_size: int = 0


def peak_memory(work: Workload, config: BitsMoEConfig) -> dict[str, int]:
    """Bytes at the peak, by part: of ``quantizing_memory``, or of tuning afterwards if that takes more."""
    phases = [quantizing_memory(work, config)]
    if config.tune:
        phases.append(tuning_memory(work, config, PROCESS_BYTES))
    return max(phases, key=lambda parts: sum(parts.values()))


def quantizing_memory(work: Workload, config: BitsMoEConfig) -> dict[str, int]:
    """Bytes at the peak of quantization itself, which is the rounding of the largest layer, by part.

    Nothing here grows with the depth of the model, but ``kernels`` up to its limit.

    ``model``: the weights outside the routed experts.
    ``experts``: the unquantized ones of one layer.
    ``plan``: costs, energies and bases of one layer.
    ``kernels``: what torch keeps of the forward passes, see ``_KERNEL_BYTES``.
    ``activations``: hidden states of all tokens (embedded, inputs, exact, outputs, captured, residual,
    drift: 7 in the model's dtype; drift twice in float32, while it is taken into the basis).
    ``layer``: see ``_layer_bytes``.
    ``factors``: of all experts, if there is memory for them now, see ``rounding.kept_factors``.
    ``trial``: what planning a layer takes beyond that, see ``_planning_bytes``.
    ``shown``: with ``all_experts``, see ``_shown_bytes``.

    Checked on the CPU only, against ``ru_maxrss`` of whole runs, on layers of 5 million weights: 7 % too much
    at 2 layers, 29 % at 8, all of it ``kernels``, whose shapes repeat from layer to layer; with
    torch's cache switched off, 2 to 3 % too much without them. Nothing larger was tried.
    """
    hidden = max(shape.hidden_size for shape in work.shapes)
    bits = config.bits if config.factor_bits is None else config.factor_bits
    batches = -(-work.tokens // (config.sequence_length * config.batch_size))
    products = 2 * batches * sum(shape.num_experts for shape in work.shapes)
    factors = max(kept_bytes(shape, torch.device("cpu")) for shape in work.shapes)
    factors = 0 if config.rounds_as_planned else factors
    layer = max(_layer_bytes(shape, work.tokens, bits, config.input_bases) for shape in work.shapes)
    planning = max(_planning_bytes(shape, work.tokens, config) for shape in work.shapes)
    return {
        "process": PROCESS_BYTES,
        "model": work.other_bytes,
        "experts": work.itemsize * max(shape.weights for shape in work.shapes),
        "kernels": _KERNEL_BYTES * min(KERNELS, products) if work.itemsize == 2 else 0,
        "plan": max(_plan_bytes(shape, config) for shape in work.shapes),
        "activations": work.tokens * hidden * (7 * work.itemsize + 2 * 4),
        "layer": layer,
        "factors": factors,
        "trial": max(0, planning - layer - factors),
        "shown": max(_shown_bytes(shape, work.tokens, config) for shape in work.shapes),
    }


def _plan_bytes(shape: LayerShape, config: BitsMoEConfig) -> int:
    """``layer_plan.LayerPlan``: costs and energies in float32, codes of the bases."""
    rows = len(shape.factors) * shape.num_experts * shape.rank * (len(config.widths) + 1)
    code = 2 if config.basis_bits == 16 else 1
    return 4 * rows + code * (min(config.input_bases, shape.inputs) + 1) * shape.rank * shape.hidden_size


def _layer_bytes(shape: LayerShape, tokens: int, bits: float, input_bases: int) -> int:
    """The working set of ``layer_rounding.round_experts``, float32 but where said otherwise.

    Held all along: second moments, bases and their inverses (about 10 of [H, H], two of them in float64),
    inputs in the basis, packed rows.
    Of a group of experts: gate and up as factors, what is left of them, codes and values; feedback twice
    (while it is stacked). Of one expert: inputs, in the basis and not, and activations of the tokens that
    down is refitted to.
    """
    input_bases = min(input_bases, shape.inputs)
    covariance = input_bases * shape.rank**2
    group = min(shape.num_experts, max(1, CPU_WORKING_SET // covariance))
    kept = 12 * 4 * shape.hidden_size**2 + 4 * tokens * input_bases * shape.rank
    kept += int(bits * shape.weights / 8)
    rows = shape.inputs * group * shape.rank * shape.intermediate_size
    return kept + 4 * 4 * rows + 2 * 4 * group * covariance + _activity_bytes(shape, tokens, input_bases)


def _planning_bytes(shape: LayerShape, tokens: int, config: BitsMoEConfig) -> int:
    """The working set of ``layer_plan.plan_layer`` and what comes before, in float32: that of the bases (21
    of [H, H]), or of the trial (7 held; feedback and decoded rows of some experts, these three times while
    they are joined and judged).

    GB measured (estimated), 16 experts of 3,584 x 1,024 and of 7,168 x 2,048: bases 0.97 (1.08) and 4.35
    (4.32), trial 1.55 (1.85) and 6.92 (7.37).
    """
    square, bases = 4 * shape.hidden_size**2, min(config.input_bases, shape.inputs)
    if config.cost != "output":
        return 21 * square
    experts = len(trial_experts(shape.num_experts))
    rows = 4 * len(shape.factors) * shape.rank * shape.intermediate_size
    held = 7 * square + 4 * tokens * bases * shape.rank
    return max(21 * square, held + experts * (bases * square + 3 * rows))


def _activity_bytes(shape: LayerShape, tokens: int, input_bases: int) -> int:
    """Of the one expert at work, if all tokens are its."""
    seen = min(tokens, enough(REFIT_TOKENS, shape.intermediate_size))
    return 4 * seen * ((1 + input_bases) * shape.hidden_size + _NEURON_VALUES * shape.intermediate_size)


def _shown_bytes(shape: LayerShape, tokens: int, config: BitsMoEConfig) -> int:
    """What ``all_experts`` adds: which tokens every expert sees and their weights, and as many activations of
    the one expert at work again."""
    if not config.all_experts:
        return 0
    shown = _activity_bytes(shape, tokens, min(config.input_bases, shape.inputs))
    return tokens * 12 * shape.num_experts + shown


def rough_seconds(work: Workload, config: BitsMoEConfig) -> float | None:
    """Order of magnitude of the time on this machine; None if the experts per token are unknown.

    Two terms: matrix products, counted and divided by a speed measured now (for 10 ms), and pricing and
    rounding (and decoding, for ``tune``), in proportion to the expert weights.
    """
    if work.experts_per_token is None:
        return None
    weights = sum(shape.weights for shape in work.shapes)
    flops = 4 * 2 * work.tokens * work.active_weights
    flops += sum(_layer_flops(shape, work.tokens, work.experts_per_token) for shape in work.shapes)
    if config.all_experts:
        flops += sum(_shown_flops(shape, work.tokens, work.experts_per_token) for shape in work.shapes)
    flops += tuning_flops(work, config)
    slower = 1 if native.library() is not None else _WITHOUT_KERNELS
    alone = slower * _SECONDS_PER_WEIGHT * weights + tuning_decoding(work, config)
    return alone / torch.get_num_threads() + flops / _matmul_speed()


def tuning_ways(work: Workload, config: BitsMoEConfig) -> dict[str, dict[str, float | None]]:
    """Way of ``TuningSettings.through`` -> ``memory_bytes`` at the peak and ``seconds``, None if unknown; of
    tuning alone."""
    speed = _matmul_speed()
    found: dict[str, dict[str, float | None]] = {}
    for way, memory in (("layers", layers_memory), ("model", model_memory)):
        own = copy.copy(config)
        own.tune_through = way
        seconds = tuning_decoding(work, own) / torch.get_num_threads() + tuning_flops(work, own) / speed
        found[way] = {
            "memory_bytes": sum(memory(work, own, PROCESS_BYTES, TuningSettings(through=way)).values()),
            "seconds": None if work.experts_per_token is None else seconds,
        }
    return found


def _layer_flops(shape: LayerShape, tokens: int, experts_per_token: int) -> int:
    """Multiplications and additions in matrix products for one layer.

    Four forward passes (first pass; exact, captured and rounded in the second). Of as many rows as are drawn:
    activations (4HI) and their covariances (2I^2) in the plan, means of activations, exact and rounded ones
    (8HI) and what down is refitted to (4I^2), covariances of inputs (H^2, one half). Inputs in the basis
    (2H^2) per token and pass; Gram matrices (4IH^2), feedback factors (1/3 n^3 for gate and up, 4/3 n^3 for
    down, in float64 at half the speed) and factors (6IH^2) per expert.
    """
    h, i = shape.hidden_size, shape.intermediate_size
    rows = tokens * experts_per_token // shape.num_experts
    planned = min(rows, max(FEWEST_MOMENT_TOKENS, MOMENT_TOKENS * i))
    refitted, covered = min(rows, enough(REFIT_TOKENS, i)), min(rows, enough(COVARIANCE_TOKENS, h))
    per_expert = 2 * (10 * i * h**2 + 2 * 2 * 2 * h**3 // 3 + 2 * 8 * i**3 // 3)
    per_expert += planned * (4 * h * i + 2 * i**2) + min(rows, MEAN_TOKENS) * 4 * h * i
    per_expert += refitted * (8 * h * i + 4 * i**2) + covered * h**2
    passes = tokens * (experts_per_token * 4 * 6 * h * i + 2 * 2 * h**2)
    return passes + shape.num_experts * per_expert


def _shown_flops(shape: LayerShape, tokens: int, experts_per_token: int) -> int:
    """Of the tokens that ``all_experts`` shows to experts that they are not routed to, as many as are drawn.

    Gate and up in either pass (8HI); what the refit of down compares, with exact and with rounded weights
    (8HI); covariances of hidden activations, once in the first pass (2I^2) and twice in the refit (4I^2).
    """
    h, i = shape.hidden_size, shape.intermediate_size
    others = tokens * (shape.num_experts - experts_per_token) // shape.num_experts
    shown = shape.num_experts * min(others, enough(REFIT_TOKENS, i))
    return shown * (16 * h * i + 6 * i**2)


def _matmul_speed() -> float:
    """Multiplications and additions per second in products as statistics have them, best of a few."""
    matrix = torch.ones(512, 512)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product(matrix, matrix)
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best
