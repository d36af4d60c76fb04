"""Compile the Triton kernels for GPUs that need not be there, and report what they use.

    python -m bitsmoe_plugin.runtime.triton.compile [--hidden 2048 --intermediate 768 ...] [--json]
    python -m bitsmoe_plugin.runtime.triton.compile --rounding     those that quantize, instead

Kernels are compiled for the launches that a forward pass over a layer of the given sizes makes: the
same arguments and constants. Registers, spills and stack come from ptxas (``-v``), shared memory from
what Triton asks the driver for at launch. ``TRITON_INTERPRET`` must not be set. About a minute per GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitsmoe_plugin.base.triton_launch import Launch
from bitsmoe_plugin.codec import row_codec
from bitsmoe_plugin.codec.backends import gpu
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime.triton.layer import DECODE_TOKENS, TritonLayer
from bitsmoe_plugin.runtime.triton.target import Target, block_sizes

CAPABILITIES = (80, 90, 100)
DTYPES = ("float16", "bfloat16", "float32")
TOKENS = (1, DECODE_TOKENS, 256)
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
        kernel: name of the function, with the bits of the basis if it reads one.
        capability: 80 for sm_80.
        dtypes: of the hidden states for which this very code is launched.
        registers: per thread.
        stack, spill_stores, spill_loads: bytes per thread.
        shared: bytes per program.
        warps: per program.
    """

    kernel: str
    capability: int
    dtypes: str
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
    hidden = torch.zeros(tokens, spec.shape.hidden_size, dtype=dtype)
    ids = torch.zeros(tokens, slots, dtype=torch.int32)
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


def compile_launch(launch: Launch, capability: int, dtypes: str) -> Resources:
    """Compile one kernel, from scratch, with the specialisations that a launch would get.

    Args:
        dtypes: for the result.

    Raises:
        ConfigError: the kernels were imported with TRITON_INTERPRET set.
        RuntimeError: ptxas reported nothing.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ConfigError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    names = launch.kernel.arg_names
    given = launch.arguments | launch.constants
    constants = {name: value for name, value in given.items() if name in launch.constants or _is_one(value)}
    divisible = [name for name in names if name not in constants and _divisible(given[name])]
    source = ASTSource(
        launch.kernel,
        {name: "constexpr" if name in constants else _type(given[name]) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = _USAGE.search(log.getvalue())
    if found is None:
        raise RuntimeError(f"ptxas reported no resources for {launch.kernel.__name__}:\n{log.getvalue()}")
    stack, stores, loads, registers = map(int, found.groups())
    bits = launch.constants.get("BITS")
    name = launch.kernel.__name__.removesuffix("_kernel") + (f" {bits} bits" if bits else "")
    shared, warps = compiled.metadata.shared, launch.num_warps
    return Resources(
        kernel=name,
        capability=capability,
        dtypes=dtypes,
        registers=registers,
        stack=stack,
        spill_stores=stores,
        spill_loads=loads,
        shared=shared,
        warps=warps,
    )


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _type(value: Any) -> str:
    return _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"


def _divisible(value: Any) -> bool:
    """Tensors from torch's allocators start at multiples of 16 bytes."""
    return isinstance(value, Tensor) or value % 16 == 0


def _code(launch: Launch) -> str:
    """Equal for launches that share compiled code: their grids and the values of numbers may differ."""
    types = {n: (_type(v), _is_one(v), _divisible(v)) for n, v in launch.arguments.items()}
    return repr((launch.kernel.__name__, types, launch.constants, launch.num_warps, launch.num_stages))


def all_launches(
    specs: Iterable[PackedSpec], capability: int, dtypes: Iterable[str], slots: int, form: str | None = None
) -> list[tuple[Launch, str]]:
    """What one token, the most that decode takes and a prefill launch, once each, with their dtypes."""
    found: dict[str, tuple[Launch, list[str]]] = {}
    for spec in specs:
        for dtype in dtypes:
            for tokens in TOKENS:
                for launch in launches(spec, capability, getattr(torch, dtype), tokens, slots, form):
                    users = found.setdefault(_code(launch), (launch, []))[1]
                    if dtype not in users:
                        users.append(dtype)
    return [(launch, "/".join(users)) for launch, users in found.values()]


def main(arguments: list[str] | None = None) -> None:
    """Print the table for one layer's sizes, with bases of 4, 8 and 16 bits."""
    parser = argparse.ArgumentParser(description="compile the Triton kernels and report their resources")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--slots", type=int, default=8, help="experts per token")
    parser.add_argument("--grid", choices=row_codec.GRIDS, default="trellis")
    parser.add_argument("--basis-bits", type=int, choices=(4, 8, 16), nargs="+", default=(4, 8, 16))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--input-bases", type=int, choices=(1, 2), default=1)
    parser.add_argument("--no-gate", action="store_true", help="experts without a gate")
    parser.add_argument("--bias", action="store_true", help="experts with biases")
    parser.add_argument("--gating", help='text of a GatingForm, e.g. "silu,alpha=1.702,limit=7,offset=1"')
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES, help="80 for sm_80")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES[:2])
    parser.add_argument("--rounding", action="store_true", help="the kernels that quantize, instead")
    parser.add_argument("--json", action="store_true", help="one object per line")
    chosen = parser.parse_args(arguments)
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
            else all_launches(specs, capability, chosen.dtype, chosen.slots, chosen.gating)
        ):
            values = asdict(compile_launch(launch, capability, dtypes))
            line = json.dumps(values) if chosen.json else f"| {' | '.join(map(str, values.values()))} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
