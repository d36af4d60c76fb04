"""Block sizes of the Triton kernels by GPU, and where one kind of kernel takes over from another.

The sizes are reasoned, not measured: **no kernel of this package has been tuned on a GPU**. What is known of
them is that they compile without register spills, and to how many instructions (``compile``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from bitsmoe_plugin.errors import ConfigError


@dataclass(frozen=True)
class Tile:
    """One program of a product of pairs with packed rows.

    Attributes:
        rows: of a step.
        blocks: of 32 columns, of a step; a thread decodes whole blocks.
        warps: of the program.
    """

    rows: int
    blocks: int
    warps: int


@dataclass(frozen=True)
class DenseTile:
    """One program of a product of pairs with expanded rows.

    Attributes:
        columns: of the result.
        step: of the sum.
        warps: of the program.
        stages: steps whose loads run ahead.
    """

    columns: int
    step: int
    warps: int
    stages: int


_GATE_UP = {16: Tile(64, 2, 4), 32: Tile(64, 2, 4), 64: Tile(64, 2, 4), 128: Tile(64, 4, 8)}
_DOWN = {16: Tile(64, 2, 4), 32: Tile(64, 2, 4), 64: Tile(64, 2, 4), 128: Tile(64, 4, 8)}


@dataclass(frozen=True)
class BlockSizes:
    """Attributes:
    decode_tokens: up to so many tokens each pair reads the rows of its expert by itself.
    decode_blocks: at most so many blocks of 32 columns per program of gate and up in decode.
    decode_warps: of gate and up, and of down, in decode; each thread has one block of a row.
    programs_per_processor: decode cuts its work until a step has so many.
    matvec: rows and words of the input basis per step of the matrix-vector kernel.
    matvec_warps: per program.
    basis_out: rows and words of the output basis per step in decode.
    matmul: tokens, basis rows and columns per step of the matrix kernel; columns share a scale.
    matmul_warps: per program.
    expanded_tokens: from so many tokens on bases are expanded and multiplied by the library of torch, but in
        float32.
    gate_up, down: by pairs per tile, 16, 32, 64 or 128.
    pairs_per_expert: above so many on average experts are expanded, and multiplied as dense ones.
    expand: of the kernel that expands.
    dense: of the products after it, with tiles of 128 pairs.
    """

    decode_tokens: int = 3
    decode_blocks: int = 4
    decode_warps: tuple[int, int] = (8, 4)
    programs_per_processor: int = 4
    matvec: tuple[int, int] = (4, 256)
    matvec_warps: int = 4
    basis_out: tuple[int, int] = (16, 128)
    matmul: tuple[int, int, int] = (64, 64, 64)
    matmul_warps: int = 4
    expanded_tokens: int = 4
    gate_up: dict[int, Tile] = field(default_factory=lambda: _GATE_UP)
    down: dict[int, Tile] = field(default_factory=lambda: _DOWN)
    pairs_per_expert: int = 256
    expand: Tile = Tile(32, 4, 4)
    dense: DenseTile = DenseTile(128, 64, 8, 3)

    def pairs_per_tile(self, pairs: int, experts: int) -> int:
        """Twice the average of an expert, because a router prefers some, among the sizes there are."""
        wanted = 2 * pairs / experts
        return min((size for size in self.gate_up if size >= wanted), default=max(self.gate_up))


@dataclass(frozen=True)
class Target:
    """What the kernels are built for.

    Attributes:
        blocks: sizes.
        processors: streaming multiprocessors.
        float32_operands: matrix products in float32 whatever the model's dtype.
        scratch_bytes: most memory of experts that are expanded; 0: none ever are.
    """

    blocks: BlockSizes
    processors: int
    float32_operands: bool = False
    scratch_bytes: int = 2**28

    def expands(self, pairs: int, experts: int, operand: torch.dtype) -> bool:
        """Whether experts are expanded for so many pairs (``expanded``) or decoded for each tile.

        In float32, whose steps take twice the shared memory, they never are, but in the interpreter.
        """
        if not self.scratch_bytes or (operand.itemsize > 2 and not self.float32_operands):
            return False
        return pairs > self.blocks.pairs_per_expert * experts

    def operand(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the operands of matrix products for hidden states of ``dtype``; sums are float32."""
        return torch.float32 if self.float32_operands else dtype


_LARGE = {size: Tile(128, 4, 4) for size in (16, 32, 64, 128)}
INTERPRETER = Target(
    BlockSizes(
        decode_blocks=16,
        decode_warps=(16, 16),
        matvec=(64, 64),
        basis_out=(64, 64),
        matmul=(64, 128, 128),
        gate_up=_LARGE,
        down=_LARGE,
        expand=Tile(128, 4, 4),
        dense=DenseTile(128, 128, 4, 1),
    ),
    processors=1,
    float32_operands=True,
)
"""For tensors on the CPU: large blocks, because the interpreter's time goes by operations, not values;
its ``tl.dot`` is wrong for bfloat16."""

_WIDE = Tile(64, 4, 8)
_UP_TO_64 = {size: _GATE_UP[size] for size in (16, 32, 64)}
_BY_CAPABILITY: dict[int, BlockSizes] = {
    # What does not spill there. Without the tensor cores of sm_90, tiles of 128 pairs lack registers.
    # There and on sm_100, wider steps of the output basis would leave down three programs per processor.
    8: BlockSizes(gate_up=_UP_TO_64, basis_out=(16, 64)),
    10: BlockSizes(gate_up=_UP_TO_64 | {16: _WIDE, 32: _WIDE}, basis_out=(16, 64)),
    12: BlockSizes(gate_up=_UP_TO_64 | {16: _WIDE}),
}
"""Major compute capability -> sizes; others take the default."""


def block_sizes(major: int) -> BlockSizes:
    """Sizes for a major compute capability."""
    return _BY_CAPABILITY.get(major, BlockSizes())


SCRATCH = "BITSMOE_SCRATCH_MIB"
"""Environment variable, so that it reaches the workers of a server: ``Target.scratch_bytes`` in MiB."""


def scratch_bytes_wanted() -> int:
    """As the environment says, 256 MiB by default.

    Raises:
        ConfigError: it is no number of MiB.
    """
    text = os.environ.get(SCRATCH, "256")
    if not text.isdecimal():
        raise ConfigError(f"{SCRATCH}={text!r} is no number of MiB; 256 is the default, 0 expands no experts")
    return int(text) * 2**20


def target_of(device: torch.device) -> Target:
    """What to build for tensors on ``device``.

    Raises:
        ConfigError: see ``scratch_bytes_wanted``.
    """
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Target(
        block_sizes(properties.major),
        properties.multi_processor_count,
        scratch_bytes=scratch_bytes_wanted(),
    )
