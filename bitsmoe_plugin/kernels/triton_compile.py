"""Compile the Triton kernels for GPUs that need not be there, and report what they use.

    python -m bitsmoe_plugin.kernels.triton_compile [--hidden 2048 --intermediate 768 ...] [--json]

Kernels are compiled for the launches that a forward pass over a layer of the given sizes makes: the
same arguments and constants. Registers, spills and stack come from ptxas (``-v``), shared memory from
what Triton asks the driver for at launch. ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitsmoe_plugin.config import ALL_WIDTHS
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.experts import PackedSpec
from bitsmoe_plugin.kernels.triton_layer import DECODE_TOKENS, TritonLayer
from bitsmoe_plugin.kernels.triton_target import Launch, Target, block_sizes
from bitsmoe_plugin.packing import LayerShape, PackedExperts

CAPABILITIES = (80, 90, 100)
PROCESSORS = 132
"""Of an H100; decides how far decode splits the rank, so grids, not code."""
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_USAGE = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        kernel: name of the function, and what it was compiled for.
        capability: 80 for sm_80.
        dtype: of the hidden states.
        registers: per thread.
        stack, spill_stores, spill_loads: bytes per thread.
        shared: bytes per program.
        warps: per program.
    """

    kernel: str
    capability: int
    dtype: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int


def empty_layer(spec: PackedSpec) -> PackedExperts:
    """A layer of the spec's sizes with all rows dropped: what is compiled does not depend on values."""
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.tensors().items()}
    return PackedExperts(**{name.removeprefix("bitsmoe_"): tensor for name, tensor in tensors.items()})


def launches(spec: PackedSpec, capability: int, dtype: torch.dtype, tokens: int, slots: int) -> list[Launch]:
    """What a forward pass over ``tokens`` tokens with ``slots`` experts each would launch."""
    target = Target(block_sizes(capability // 10), PROCESSORS)
    layer = TritonLayer.prepare(spec, empty_layer(spec), "silu", target)
    hidden = torch.zeros(tokens, spec.shape.hidden_size, dtype=dtype)
    ids = torch.zeros(tokens, slots, dtype=torch.int32)
    recorded: list[Launch] = []
    layer.forward(hidden, ids, ids.float(), recorded.append)
    return recorded


def compile_launch(launch: Launch, capability: int, dtype: torch.dtype) -> Resources:
    """Compile one kernel, from scratch, with the specialisations that a launch would get.

    Raises:
        ConfigError: the kernels were imported with TRITON_INTERPRET set.
        RuntimeError: ptxas reported nothing.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ConfigError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    names = launch.kernel.arg_names
    given = launch.arguments | launch.constants
    constants = {name: value for name, value in given.items() if name in launch.constants or _is_one(value)}
    signature = {name: "constexpr" if name in constants else _type(given[name]) for name in names}
    divisible = [name for name in names if name not in constants and _divisible(given[name])]
    source = ASTSource(
        launch.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        )
    found = _USAGE.search(log.getvalue())
    if found is None:
        raise RuntimeError(f"ptxas reported no resources for {launch.kernel.__name__}:\n{log.getvalue()}")
    stack, stores, loads, registers = map(int, found.groups())
    name = str(dtype).removeprefix("torch.")
    shared, warps = compiled.metadata.shared, launch.num_warps
    kernel = launch.kernel.__name__.removesuffix("_kernel")
    return Resources(kernel, capability, name, registers, stack, stores, loads, shared, warps)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _type(value: Any) -> str:
    return _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"


def _divisible(value: Any) -> bool:
    """Tensors from torch's allocators start at multiples of 16 bytes."""
    return isinstance(value, Tensor) or value % 16 == 0


def distinct(found: Iterable[Launch]) -> list[Launch]:
    """Without launches that need no compilation of their own: grid and sizes may differ."""
    seen: dict[str, Launch] = {}
    for launch in found:
        types = {
            name: (_type(value), _is_one(value), _divisible(value))
            for name, value in launch.arguments.items()
        }
        seen.setdefault(repr((launch.kernel.__name__, types, launch.constants, launch.num_warps)), launch)
    return list(seen.values())


def report(
    spec: PackedSpec, capability: int, dtype: torch.dtype, slots: int, tokens: Iterable[int]
) -> Iterator[Resources]:
    """Resources of every kernel that passes over ``tokens`` tokens take; 16-bit, 8-bit and 4-bit bases."""
    found = distinct(
        launch for count in tokens for launch in launches(spec, capability, dtype, count, slots)
    )
    for launch in found:
        resources = compile_launch(launch, capability, dtype)
        bits = launch.constants.get("BITS")
        yield replace(resources, kernel=f"{resources.kernel} {bits} bit") if bits else resources


def bases_only(launch: Launch) -> bool:
    """Whether the kernel reads a basis."""
    return "BITS" in launch.constants


def main(arguments: list[str] | None = None) -> None:
    """Print the table for one layer's sizes."""
    parser = argparse.ArgumentParser(description="compile the Triton kernels and report their resources")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--slots", type=int, default=8, help="experts per token")
    parser.add_argument("--grid", choices=("trellis", "uniform"), default="trellis")
    parser.add_argument("--basis-bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--input-bases", type=int, choices=(1, 2), default=1)
    parser.add_argument("--capability", type=int, action="append", help="80 for sm_80; repeatable")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), action="append")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    shape = LayerShape(chosen.experts, chosen.hidden, chosen.intermediate)
    spec = PackedSpec(
        shape, ALL_WIDTHS, chosen.basis_bits, chosen.group_size, chosen.input_bases, 0, chosen.grid
    )
    columns = list(Resources.__dataclass_fields__)
    if not chosen.json:
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for capability in chosen.capability or CAPABILITIES:
        for dtype in chosen.dtype or ("float16", "bfloat16"):
            tokens = (1, 64) if chosen.basis_bits == 16 else (1, DECODE_TOKENS, 64)
            for row in report(spec, capability, getattr(torch, dtype), chosen.slots, tokens):
                values = asdict(row)
                line = json.dumps(values) if chosen.json else f"| {' | '.join(map(str, values.values()))} |"
                print(line, flush=True)


if __name__ == "__main__":
    main()
