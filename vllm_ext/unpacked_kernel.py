"""Linear layers whose width or shape no kernel of vLLM has on a CPU: unpacked when they are loaded.

vLLM 0.32 has kernels for 4 bits there, for 8 on GPUs alone. Such layers take the memory of 16 bits, with a
warning; what they compute is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from bitsmoe_plugin.codec.dense import GROUP_SIZES, PACKED, SCALE, SHAPE, DenseScheme
from bitsmoe_plugin.runtime.dense_linear import unpack

logger = init_logger("vllm.bitsmoe_plugin")
_BITS = {scalar_types.uint4b8: 4, scalar_types.uint8b128: 8}


class UnpackedLinearKernel(MPLinearKernel):
    """The last that vLLM tries, after its own."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if not current_platform.is_cpu():
            return False, "only for CPUs"
        if c.weight_type not in _BITS or c.zero_points or c.group_size not in GROUP_SIZES:
            return False, "only for 4 or 8 bits around zero in groups of 32 or 128"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put the weight in the place of its codes."""
        inputs, outputs = self.config.partition_weight_shape
        scheme = DenseScheme(_BITS[self.config.weight_type], self.config.group_size)
        logger.warning_once(
            "vLLM has no kernel here for linear layers in %d bits of these sizes (dense_bits); they are "
            "unpacked, and take the memory of unquantized ones",
            scheme.bits,
        )
        codes, scales, _ = self._get_weight_params(layer)
        tensors = {PACKED: codes.data, SCALE: scales.data, SHAPE: torch.tensor([outputs, inputs])}
        weight = torch.nn.Parameter(unpack(tensors, scheme), requires_grad=False)
        replace_parameter(layer, self.w_q_name, weight)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, getattr(layer, self.w_q_name), bias)


def register_unpacked() -> None:
    """Let vLLM know it; again does nothing."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS

    if UnpackedLinearKernel not in _POSSIBLE_KERNELS.get(PlatformEnum.CPU, []):
        register_linear_kernel(UnpackedLinearKernel, PlatformEnum.CPU)
