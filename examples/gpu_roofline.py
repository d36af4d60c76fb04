"""What the parts of a packed layer should take on a GPU, estimated from compiled code. Nothing is measured.

    python -m bitsmoe_plugin.runtime.triton.compile --json --basis-bits 4 --dtype bfloat16 > KERNELS
    python examples/gpu_roofline.py [KERNELS, by default examples/gpu_kernels.jsonl]

A part takes the longest of: its bytes at the bandwidth of memory, its decoding instructions at one per
scheduler and cycle, its products at the peak of the tensor cores; a launch takes 1.5 microseconds. Programs
that wait for others of their launch (``runtime.triton.decode_output``) learn of them by three trips to the L2
cache, 1 microsecond, and read all of the experts' outputs from there for each tile of the basis. That is a
lower bound: latency, bank conflicts and waits between steps come on top.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.commands.bench.synthetic import shares_at
from bitsmoe_plugin.commands.defaults import SHAPES
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime.triton.compile import launches
from bitsmoe_plugin.runtime.triton.target import Target, block_sizes

LAUNCH = 1.5e-6
HANDOVER = 1e-6
L2 = 5.5e12
"""Bytes per second that an H100 reads from its L2 cache, as others have measured."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
BITS = 1.83
"""Of the rows of a layer of 2 counted bits, about; bases, row codes and scales take the rest."""


@dataclass(frozen=True)
class Gpu:
    """Data sheet: bytes and bfloat16 operations per second, processors of 128 lanes, cycles per second."""

    name: str
    bandwidth: float
    operations: float
    processors: int = 132
    clock: float = 1.755e9


GPUS = (Gpu("H100", 3.35e12, 0.99e15), Gpu("H200", 4.8e12, 0.99e15))


def instructions(pairs: int) -> tuple[float, float]:
    """Per weight of rows of 2 bits on sm_90: of gate and up, and of down; ``pairs`` per tile, 0 in decode."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("gpu_kernels.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    own = [row for row in rows if (row["capability"], row["pairs"]) == (90, pairs) and row["instructions"]]
    counts = {row["kernel"].removeprefix("grouped_"): row["instructions"]["2"] for row in own}
    return counts["gate_up"], counts["down"] if pairs else counts["output 4 bits"]


def pairs_of_experts(tokens: int, experts: int, slots: int) -> torch.Tensor:
    """``[experts]`` pairs of each, of a router that prefers none."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    return torch.bincount(chosen.flatten(), minlength=experts)


def number_of_launches(tokens: int) -> int:
    """Of a packed layer, with the products of torch, one for each basis that is expanded."""
    sizes, slots = SHAPES["qwen3-30b-a3b"]
    spec = PackedSpec(LayerShape(*sizes), ALL_WIDTHS, 4, 128, 1, payload_words=0, grid="trellis")
    names = [launch.kernel.__name__ for launch in launches(spec, 90, torch.bfloat16, tokens, slots)]
    return len(names) + names.count("expand_kernel")


def estimate(gpu: Gpu, tokens: int) -> tuple[float, float]:
    """Seconds of a layer of Qwen3-30B-A3B in bfloat16 and packed at 2 bits."""
    (experts, hidden, size), slots = SHAPES["qwen3-30b-a3b"]
    target = Target(block_sizes(9), gpu.processors)
    pairs, factor = pairs_of_experts(tokens, experts, slots), hidden * size
    used, total = int((pairs > 0).sum()), tokens * slots

    def seconds(moved: float, issued: float = 0.0, products: float = 0.0) -> float:
        rate = gpu.processors * 128 * gpu.clock
        return max(moved / gpu.bandwidth, issued / rate, products / gpu.operations)

    dense = seconds(6 * factor * used + 8 * total * size, products=6 * factor * total) + 4 * LAUNCH
    stored = 1 - shares_at(BITS, ALL_WIDTHS)[ALL_WIDTHS.index(0)]
    payload, bases = factor * BITS / 8, hidden * hidden * 4.5 / 8
    weights, launched = factor * stored, number_of_launches(tokens) * LAUNCH
    if tokens <= target.blocks.decode_tokens:
        gate_up, down = instructions(0)
        rows = seconds(2 * payload * total, 2 * weights * total * gate_up)
        rows += seconds(payload * total, weights * total * down)
        tiles = tokens * hidden / target.blocks.basis_out[0]
        parts = tiles * 4 * hidden * slots / L2
        return dense, 2 * seconds(bases, hidden * hidden * 3) + rows + parts + launched + HANDOVER
    expanded = 2 * seconds(bases + 4 * hidden**2, products=2 * hidden**2 * tokens)
    parts = seconds(8 * total * hidden)  # written, and read by their sum
    if target.expands(total, experts, torch.bfloat16):
        written = seconds(3 * used * (payload + 2 * factor))
        read = seconds(6 * factor * used, products=6 * factor * total)
        return dense, expanded + written + read + parts + launched
    tile = target.blocks.pairs_per_tile(total, experts)
    tiles = int(((pairs + tile - 1) // tile).sum())
    gate_up, down = instructions(tile)
    scaled = seconds(2 * 2 * 2 * hidden * total)
    rows = seconds(2 * payload * used, 2 * weights * tiles * gate_up, 4 * weights * tiles * tile)
    rows += seconds(payload * used, weights * tiles * down, 2 * weights * tiles * tile)
    return dense, expanded + scaled + rows + parts + launched


def main() -> None:
    """Print a table of Markdown, in microseconds."""
    print("| estimated, microseconds | " + " | ".join(f"{n} tokens" for n in TOKENS) + " |")
    print("|---" * (len(TOKENS) + 1) + "|")
    print("| launches of a layer, 2 bits | " + " | ".join(str(number_of_launches(n)) for n in TOKENS) + " |")
    for gpu in GPUS:
        both = zip(*(estimate(gpu, tokens) for tokens in TOKENS), strict=True)
        for name, times in zip(("bf16", "2 bits"), both, strict=True):
            print(f"| {gpu.name}, {name} | " + " | ".join(f"{1e6 * t:.0f}" for t in times) + " |")


if __name__ == "__main__":
    main()
