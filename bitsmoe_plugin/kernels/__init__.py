"""Forward pass of packed experts: which implementation computes it is decided here alone."""

from __future__ import annotations

import warnings
from typing import Protocol

from torch import Tensor

from bitsmoe_plugin.packed_spec import PackedSpec
from bitsmoe_plugin.packing import PackedExperts
from bitsmoe_plugin.statistics import Gating


class Runtime(Protocol):
    """A packed layer or shard, ready to compute."""

    @property
    def packed(self) -> PackedExperts:
        """The tensors that it computes from."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Output of these experts.

        Args:
            hidden: ``[T, H]``.
            top_k_index: ``[T, k]`` integer; ids outside 0..E-1 are skipped.
            top_k_weights: ``[T, k]``.

        Returns:
            ``[T, H]`` in the dtype of ``hidden``; of a shard, its part of the sum over shards.
        """


def prepare(spec: PackedSpec, packed: PackedExperts, gating: Gating) -> Runtime:
    """The fastest implementation for the device that the tensors are on."""
    from bitsmoe_plugin.kernels import cpu
    from bitsmoe_plugin.kernels.reference import ReferenceLayer

    if packed.payload.device.type == "cpu":
        if cpu.library() is not None:
            return cpu.CpuLayer.prepare(spec, packed, gating)
        warnings.warn(
            "bitsmoe: the kernels for the CPU were not compiled when the package was installed, so packed "
            "experts run 10 times slower, in plain torch. Install a C compiler (gcc or clang) and reinstall.",
            stacklevel=2,
        )
    return ReferenceLayer.prepare(spec, packed, gating)
