"""``bench allocation``: one budget over all rows of a model of full size, against a budget per layer.

The costs are synthetic: size, certificate, time and memory are those of a real problem, but how much a
budget per layer loses follows from the spread that was drawn. A row's energy is a power law over the rank
whose exponent differs between layers, times log-normal scales of layer, expert and row. Its relative
distortion at every width is measured: it is that of one of 1,024 Gaussian rows of the given length, as
``row_costs.row_costs`` computes it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmoe_plugin.allocation.budget import plan_budget
from bitsmoe_plugin.allocation.knapsack.solve import allocate
from bitsmoe_plugin.allocation.row_costs import DROP_WEIGHT, GATE_UP_WEIGHT
from bitsmoe_plugin.codec import row_codec, uniform
from bitsmoe_plugin.codec.layout import LayerShape, row_sizes
from bitsmoe_plugin.commands.bench.output import Row
from bitsmoe_plugin.config import BitsMoEConfig

_SHAPES = 1024

Table = NDArray[np.float32]


def relative_distortions(config: BitsMoEConfig, size: int, seed: int) -> Table:
    """``[1024, widths]``: cost over energy of Gaussian rows of ``size`` values at each width."""
    rows = torch.randn(_SHAPES, size, generator=torch.Generator().manual_seed(seed))
    energy, ones = rows.square().sum(-1), torch.ones(1, size)
    table = [
        uniform.best_scale(rows, ones, width)[1] / energy * row_codec.expected_gain(width, config.grid, size)
        for width in config.widths
    ]
    return torch.stack(table, -1).numpy()


def layer_costs(distortions: Table, experts: int, rank: int, seed: tuple[int, int]) -> Table:
    """Costs of one layer, ``[3 * experts * rank, widths]`` float32.

    Args:
        distortions: ``[shapes, widths]``, the first width 0.
        seed: of the model, and the layer's index.
    """
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, rank + 1) ** -random.uniform(0.8, 1.6)
    scale = random.lognormal(0, 1) * random.lognormal(0, 1, size=(1, experts, 1)) / rank
    energy = scale * spectrum * random.lognormal(0, 0.5, size=(3, experts, rank))
    costs = distortions[random.integers(len(distortions), size=energy.shape)]
    costs *= energy[..., None].astype(np.float32)
    costs[:2] *= GATE_UP_WEIGHT
    costs[:2, ..., 0] *= DROP_WEIGHT
    return costs.reshape(-1, distortions.shape[1])


def measure(args: argparse.Namespace) -> list[Row]:
    """One row: size of the problem, result, certificate, time and memory."""
    config = BitsMoEConfig(bits=args.bits)
    shape = LayerShape(args.experts, args.rank, args.intermediate_size)
    budget = plan_budget([shape] * args.layers, config)
    sizes = row_sizes(shape, config.widths)
    distortions = relative_distortions(config, args.intermediate_size, args.seed)
    costs = [
        layer_costs(distortions, args.experts, args.rank, (args.seed, layer)) for layer in range(args.layers)
    ]
    start = time.perf_counter()
    result = allocate(costs, [sizes] * args.layers, budget.payload_bits)
    seconds = time.perf_counter() - start
    peak = peak_rss_bytes()
    start = time.perf_counter()
    alone = [allocate([block], [sizes], budget.payload_bits // args.layers).objective for block in costs]
    return [
        {
            "layers": args.layers,
            "experts": args.experts,
            "rank": args.rank,
            "bits": args.bits,
            "units": len(result.choice),
            "objective": result.objective,
            "lower_bound": result.lower_bound,
            "relative_gap": result.relative_gap,
            "dual_relative_gap": 1 - result.dual_bound / result.objective,
            "core_units": result.core_units,
            "seconds": seconds,
            "peak_rss_bytes": peak,
            "per_layer_objective": sum(alone),
            "per_layer_over_global": sum(alone) / result.objective,
            "per_layer_seconds": time.perf_counter() - start,
        }
    ]


def peak_rss_bytes() -> int:
    """Most memory this process has held so far (ru_maxrss is in KiB, on macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
