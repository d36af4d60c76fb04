"""One kernel compiled for a GPU that need not be there, and what it uses."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitsmoe_plugin.base.triton_launch import Launch
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.runtime.triton.sass import decoding_instructions

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
        pairs: per tile; 0 for kernels without tiles.
        registers: per thread.
        stack, spill_stores, spill_loads: bytes per thread.
        shared: bytes per program.
        warps: per program.
        instructions: of the loops over packed words, per weight that a thread decodes, by width; those of
            tensor cores count as what they are, one for many weights. Empty for other kernels.
    """

    kernel: str
    capability: int
    dtypes: str
    pairs: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    instructions: dict[int, float]


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
    instructions = decoding_instructions(compiled.asm["cubin"], launch)
    return Resources(
        kernel=name,
        capability=capability,
        dtypes=dtypes,
        pairs=launch.constants.get("TOKENS", 0) if "WIDTHS" in launch.constants else 0,
        registers=registers,
        stack=stack,
        spill_stores=stores,
        spill_loads=loads,
        shared=shared,
        warps=warps,
        instructions=instructions,
    )


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _type(value: Any) -> str:
    return _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"


def _divisible(value: Any) -> bool:
    """Tensors from torch's allocators start at multiples of 16 bytes."""
    return isinstance(value, Tensor) or value % 16 == 0


def code_of(launch: Launch) -> str:
    """Equal for launches that share compiled code: their grids and the values of numbers may differ."""
    types = {n: (_type(v), _is_one(v), _divisible(v)) for n, v in launch.arguments.items()}
    return repr((launch.kernel.__name__, types, launch.constants, launch.num_warps, launch.num_stages))
