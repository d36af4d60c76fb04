"""``bench layer``: one MoE layer of a known model's shape, ours and others side by side."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.bench.contenders import Contender, contenders
from bitsmoe_plugin.commands.bench.output import Row
from bitsmoe_plugin.commands.bench.timing import Stopwatch, capture
from bitsmoe_plugin.commands.defaults import SHAPES

GRAPH = ", CUDA graph"
COPY_BYTES = 2**28


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written; the best of ten."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target, stopwatch = torch.empty_like(source), Stopwatch.on(device)
    return 2 * COPY_BYTES / min(stopwatch.seconds(lambda: target.copy_(source)) for _ in range(10))


def _inputs(shape: LayerShape, k: int, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(tokens, shape.num_experts).topk(k).indices
    weights = torch.full((tokens, k), 1 / k)
    hidden = torch.randn(tokens, shape.hidden_size, dtype=torch.bfloat16)
    return hidden.to(device), ids.to(device), weights.to(device)


def _seconds(
    entries: Sequence[Contender], batches: Sequence[tuple[Tensor, ...]], device: str
) -> dict[str, list[float]]:
    """Name of the method -> median of the calls and, on a GPU, of the replays of a CUDA graph.

    Taken in turns so that a slow moment of the machine hits all of them.
    """
    stopwatch = Stopwatch.on(device)
    stopwatch.warm_up([partial(entry.forward, *batches[0]) for entry in entries])
    graphs = [capture(entry, batches[0]) if device != "cpu" else None for entry in entries]
    times: list[list[list[float]]] = [[[], []] for _ in entries]
    for batch in batches[1:]:
        for entry, graph, (calls, replays) in zip(entries, graphs, times, strict=True):
            calls.append(stopwatch.seconds(partial(entry.forward, *batch)))
            if graph is not None:
                graph.load(batch)
                replays.append(stopwatch.seconds(graph.replay, launched_before=True))
    return {
        entry.name: [statistics.median(taken) for taken in both if taken]
        for entry, both in zip(entries, times, strict=True)
    }


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per number of tokens and contender."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes, k = SHAPES[args.shape]
    shape, device = LayerShape(*sizes), args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    entries = list(contenders(shape, args.bits, device))
    rows = []
    for tokens in args.tokens:
        batches = [_inputs(shape, k, tokens, device) for _ in range(args.repeats + 1)]
        with torch.no_grad():
            taken = _seconds(entries, batches, device)
        for entry in entries:
            moved = statistics.mean(entry.moved(ids.cpu()) for _, ids, _ in batches[1:])
            for seconds, suffix in zip(taken[entry.name], ("", GRAPH), strict=False):
                rows.append(
                    {
                        "shape": args.shape,
                        "tokens": tokens,
                        "method": entry.name + suffix,
                        "bits_per_weight": entry.bits,
                        "milliseconds": 1e3 * seconds,
                        "speed_over_first": taken[entries[0].name][0] / seconds,
                        "gigabytes_per_second": moved / seconds / 1e9,
                        "of_copy_bandwidth": moved / seconds / bandwidth,
                    }
                )
    return rows
