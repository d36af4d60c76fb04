"""Block sizes of the Triton kernels by GPU, and how a kernel is launched.

The sizes are reasoned, not measured: **no kernel of this package has been tuned, or timed, on a
GPU**. What is known of them is that they compile without register spills (``compile``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockSizes:
    """Attributes:
    blocks: at most so many blocks of 32 columns per program of a decode kernel.
    lanes: rows times blocks of a decode program; one lane per thread keeps 32 sums per thread.
    programs_per_processor: decode splits the rank until a step has so many.
    matvec: rows and words of a basis per step of the matrix-vector kernel.
    matvec_tokens: up to so many tokens go through the matrix-vector kernel, each on its own.
    matmul: tokens, basis rows and columns per step of the matrix kernel; columns share a scale.
    tokens: of one expert per prefill program.
    gate_up: rows and blocks per step of a prefill program; one block per thread, or values change threads.
    down: the same for down.
    decode_warps, matvec_warps, matmul_warps, gate_up_warps, down_warps: warps per program.
    """

    blocks: int = 32
    lanes: int = 128
    programs_per_processor: int = 4
    matvec: tuple[int, int] = (4, 256)
    matvec_tokens: int = 1
    matmul: tuple[int, int, int] = (64, 64, 64)
    tokens: int = 64
    gate_up: tuple[int, int] = (64, 2)
    down: tuple[int, int] = (64, 4)
    decode_warps: int = 4
    matvec_warps: int = 4
    matmul_warps: int = 4
    gate_up_warps: int = 4
    down_warps: int = 8


@dataclass(frozen=True)
class Target:
    """What the kernels are built for.

    Attributes:
        blocks: sizes.
        processors: streaming multiprocessors.
        float32_operands: matrix products in float32 whatever the model's dtype.
    """

    blocks: BlockSizes
    processors: int
    float32_operands: bool = False

    def operand(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the operands of matrix products for hidden states of ``dtype``; sums are float32."""
        return torch.float32 if self.float32_operands else dtype


INTERPRETER = Target(
    BlockSizes(
        lanes=512,
        matvec=(64, 64),
        matmul=(64, 128, 128),
        gate_up=(128, 4),
        down=(128, 4),
    ),
    processors=1,
    float32_operands=True,
)
"""For tensors on the CPU: large blocks, because the interpreter's time goes by operations, not values;
its ``tl.dot`` is wrong for bfloat16."""

_BY_CAPABILITY: dict[int, BlockSizes] = {
    # The default leaves a thread fewer registers there and spills a word or two.
    10: BlockSizes(gate_up=(64, 4), gate_up_warps=8, matmul_warps=8),
}
"""Major compute capability -> sizes; others take the default."""


def block_sizes(major: int) -> BlockSizes:
    """Sizes for a major compute capability."""
    return _BY_CAPABILITY.get(major, BlockSizes())


def target_of(device: torch.device) -> Target:
    """What to build for tensors on ``device``."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Target(block_sizes(properties.major), properties.multi_processor_count)
