"""Block sizes of the GPU kernels, measured: python examples/gpu_sweep.py RESULTS.jsonl

Each line is a number of tokens, the sizes of a tile, and milliseconds of a layer of Qwen3-30B-A3B at 2 bits
in a CUDA graph. The sizes that win belong into ``runtime.triton.target``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.commands.bench.contenders import Contender
from bitsmoe_plugin.commands.bench.synthetic import random_layer, shares_at
from bitsmoe_plugin.commands.bench.timing import Stopwatch, capture
from bitsmoe_plugin.commands.defaults import SHAPES
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime.triton.layer import TritonLayer
from bitsmoe_plugin.runtime.triton.target import Target, Tile

TILES = (Tile(64, 2, 4), Tile(64, 4, 8), Tile(128, 2, 8), Tile(32, 2, 2))
TOKENS = (64, 256, 1, 4, 16, 1024, 4096, 8192)


def candidates(tokens: int, target: Target) -> Iterator[tuple[str, Target]]:
    """Descriptions and targets to try for a number of tokens."""
    blocks = target.blocks
    if tokens <= blocks.decode_tokens:
        for warps in ((4, 4), (8, 4), (8, 8)):
            for programs in (2, 4, 8):
                sizes = replace(blocks, decode_warps=warps, programs_per_processor=programs)
                yield f"warps {warps}, {programs} programs", replace(target, blocks=sizes)
        for out in ((16, 64), (8, 256), (32, 64)):
            yield f"output basis {out}", replace(target, blocks=replace(blocks, basis_out=out))
        return
    if tokens <= 16:
        yield "each pair by itself", replace(target, blocks=replace(blocks, decode_tokens=16))
    if tokens >= 1024:
        yield "expanded", replace(target, blocks=replace(blocks, pairs_per_expert=0))
    usual = blocks.pairs_per_tile(8 * tokens, 128)
    for pairs in sorted({max(16, usual // 2), usual, min(128, 2 * usual)}):
        for tile in TILES:
            sizes = replace(blocks, gate_up={pairs: tile}, down={pairs: tile})
            yield f"tiles of {pairs}: {asdict(tile)}", replace(target, blocks=sizes, scratch_bytes=0)


def main(path: str) -> None:
    """Measure until all are tried, or time is up: each line is written at once. What fails is a line, too."""
    (experts, hidden, size), slots = SHAPES["qwen3-30b-a3b"]
    shape = LayerShape(experts, hidden, size)
    spec, packed = random_layer(shape, widths=ALL_WIDTHS, shares=shares_at(1.83, ALL_WIDTHS))
    moved = {name.removeprefix("bitsmoe_"): tensor.cuda() for name, tensor in packed.tensors()}
    layer, stopwatch = TritonLayer.prepare(spec, PackedExperts(**moved), "silu"), Stopwatch.on("cuda")
    with Path(path).open("w") as file, torch.no_grad():
        stopwatch.warm_up([lambda: torch.ones(2**24, device="cuda").sum()])
        for tokens in TOKENS:
            ids = torch.rand(tokens, experts, device="cuda").topk(slots).indices
            x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
            batch = x, ids, torch.full(ids.shape, 1 / slots, device="cuda")
            for name, target in candidates(tokens, layer.target):
                entry = Contender(name, 2.0, replace(layer, target=target).forward, lambda _: 0)
                line: dict[str, object] = {"tokens": tokens, "sizes": name}
                try:
                    entry.forward(*batch)
                    graph = capture(entry, batch)
                    assert graph is not None
                    times = [stopwatch.seconds(graph.replay, launched_before=True) for _ in range(9)]
                    line["milliseconds"] = 1e3 * statistics.median(times)
                except Exception as error:  # of the compiler, or too much shared memory
                    line["error"] = str(error)[:200]
                print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
