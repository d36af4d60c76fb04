"""Compile the Triton kernels for GPUs that need not be there, and report what they use.

    python -m bitsmoe_plugin.runtime.triton.compile [--hidden 2048 --intermediate 768 ...] [--json]
    python -m bitsmoe_plugin.runtime.triton.compile --rounding     those that quantize, instead

Kernels are compiled for the launches that a forward pass over a layer of the given sizes makes: the
same arguments and constants. Registers, spills and stack come from ptxas (``-v``), shared memory from
what Triton asks the driver for at launch. ``TRITON_INTERPRET`` must not be set. About a minute per GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict

import torch

from bitsmoe_plugin.base.argument_types import count
from bitsmoe_plugin.base.triton_launch import Launch
from bitsmoe_plugin.codec import row_codec
from bitsmoe_plugin.codec.backends import gpu
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime.triton.compiled import Resources, code_of, compile_launch
from bitsmoe_plugin.runtime.triton.layer import TritonLayer
from bitsmoe_plugin.runtime.triton.target import Target, block_sizes

CAPABILITIES = (80, 90, 100, 120)
DTYPES = ("float16", "bfloat16", "float32")
TOKENS = (1, 64, 256, 512, 1024, 8192)
"""Of Qwen3-30B-A3B's layer: one for decode, one for each size of tiles, one where experts are expanded."""
PROCESSORS = 132
"""Of an H100; decides how far decode splits the rank, so grids, not code."""


def empty_layer(spec: PackedSpec) -> PackedExperts:
    """A layer of the spec's sizes with all rows dropped: what is compiled does not depend on values."""
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.tensors().items()}
    return PackedExperts(**{name.removeprefix("bitsmoe_"): tensor for name, tensor in tensors.items()})


def launches(
    spec: PackedSpec,
    capability: int,
    dtype: torch.dtype,
    tokens: int,
    slots: int,
    form: str | None = None,
) -> list[Launch]:
    """What a forward pass over ``tokens`` tokens with ``slots`` experts each would launch.

    Args:
        form: text of the ``GatingForm``; by default that of most families.
    """
    form = form or ("silu" if spec.shape.has_gate else "relu2,has_gate=0")
    target = Target(block_sizes(capability // 10), PROCESSORS)
    layer = TritonLayer.prepare(spec, empty_layer(spec), form, target)
    hidden = torch.empty(tokens, spec.shape.hidden_size, dtype=dtype, device="meta")
    ids = torch.empty(tokens, slots, dtype=torch.int32, device="meta")
    recorded: list[Launch] = []
    layer.forward(hidden, ids, ids.float(), recorded.append)
    return recorded


def rounding_launches(size: int, grid: str) -> list[Launch]:
    """What rounding and packing rows of ``size`` values would launch."""
    recorded: list[Launch] = []
    rows, scales = torch.zeros(4, 2, size)[:, 0], torch.ones(4)
    codes = torch.zeros(4, row_codec.padded(size), dtype=torch.int32)
    bits = torch.full((4,), 2)
    into = codes, torch.zeros(4, size), grid
    gpu.round_into(rows, scales, torch.ones(2, size), 2, bits, *into, recorded.append, on_gpu=True)
    gpu.TRITON.choose_scales(rows, rows, bits, scales, scales, scales, recorded.append)
    gpu.TRITON.pack(codes[None], bits[None], recorded.append, on_gpu=True)
    return recorded


def all_launches(
    specs: Iterable[PackedSpec],
    capability: int,
    dtypes: Iterable[str],
    tokens_of: Iterable[int],
    slots: int,
    form: str | None = None,
) -> list[tuple[Launch, str]]:
    """What calls of so many tokens launch, once each, with their dtypes."""
    found: dict[str, tuple[Launch, list[str]]] = {}
    for spec in specs:
        for dtype in dtypes:
            for tokens in tokens_of:
                for launch in launches(spec, capability, getattr(torch, dtype), tokens, slots, form):
                    users = found.setdefault(code_of(launch), (launch, []))[1]
                    if dtype not in users:
                        users.append(dtype)
    return [(launch, "/".join(users)) for launch, users in found.values()]


def main(arguments: list[str] | None = None) -> None:
    """Print the table for one layer's sizes, with bases of 4, 8 and 16 bits."""
    parser = argparse.ArgumentParser(description="compile the Triton kernels and report their resources")
    parser.add_argument("--experts", type=count(), default=128)
    parser.add_argument("--hidden", type=count(), default=2048)
    parser.add_argument("--intermediate", type=count(), default=768)
    parser.add_argument("--slots", type=count(), default=8, help="experts per token")
    parser.add_argument("--grid", choices=(*row_codec.GRIDS, row_codec.TILED), default="trellis")
    parser.add_argument("--basis-bits", type=int, choices=(4, 8, 16), nargs="+", default=(4, 8, 16))
    parser.add_argument("--group-size", type=count(), default=128)
    parser.add_argument("--input-bases", type=int, choices=(1, 2), default=1)
    parser.add_argument("--no-gate", action="store_true", help="experts without a gate")
    parser.add_argument("--bias", action="store_true", help="experts with biases")
    parser.add_argument("--gating", help='text of a GatingForm, e.g. "silu,alpha=1.702,limit=7,offset=1"')
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES, help="80 for sm_80")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES[:2])
    parser.add_argument("--tokens", type=count(), nargs="+", default=TOKENS)
    parser.add_argument("--rounding", action="store_true", help="the kernels that quantize, instead")
    parser.add_argument("--json", action="store_true", help="one object per line")
    chosen = parser.parse_args(arguments)
    if chosen.rounding and chosen.grid == row_codec.TILED:
        parser.error(f"nothing is quantized to the grid {chosen.grid}; --rounding takes {row_codec.GRIDS}")
    shape = LayerShape(chosen.experts, chosen.hidden, chosen.intermediate, not chosen.no_gate)
    specs = [
        PackedSpec(
            shape=shape,
            widths=ALL_WIDTHS,
            basis_bits=bits,
            basis_group_size=chosen.group_size,
            input_bases=chosen.input_bases,
            payload_words=0,
            grid=chosen.grid,
            has_bias=chosen.bias,
        )
        for bits in chosen.basis_bits
    ]
    columns = list(Resources.__dataclass_fields__)
    if not chosen.json:
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for capability in chosen.capability:
        for launch, dtypes in (
            [(launch, "float32") for launch in rounding_launches(chosen.intermediate, chosen.grid)]
            if chosen.rounding
            else all_launches(specs, capability, chosen.dtype, chosen.tokens, chosen.slots, chosen.gating)
        ):
            values = asdict(compile_launch(launch, capability, dtypes))
            line = json.dumps(values) if chosen.json else f"| {' | '.join(map(str, values.values()))} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
