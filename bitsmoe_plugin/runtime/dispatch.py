"""Forward pass of packed experts: which implementation computes it is decided here alone."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from bitsmoe_plugin.base.native import absence, library
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.gating import Gating, GatingForm, form_of
from bitsmoe_plugin.runtime import batch_invariance


class Runtime(Protocol):
    """A packed layer or shard, ready to compute.

    Implementations leave out biases of down and kept experts: ``prepare`` adds them, see ``with_originals``.
    """

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
    """The fastest implementation for the device that the tensors are on; says so if it is the slow one.

    Raises:
        ConfigError: batch invariance is asked for and is not to be had there.
    """
    from bitsmoe_plugin.runtime.with_originals import WithOriginals

    runtime = _fastest(spec, packed, gating)
    return WithOriginals(runtime, spec, gating) if spec.has_bias or spec.kept else runtime


def is_plain_torch(runtime: Runtime) -> bool:
    """Whether ``prepare`` found nothing better than the reference, which waits for its device."""
    from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer
    from bitsmoe_plugin.runtime.with_originals import WithOriginals

    inner = runtime.runtime if isinstance(runtime, WithOriginals) else runtime
    return isinstance(inner, ReferenceLayer)


def warm_up(runtime: Runtime, slots: int, dtype: torch.dtype, most: int) -> None:
    """Compile kernels now that calls would compile when they come. Nothing is compiled for a CPU.

    Args:
        slots: experts per token.
        dtype: of the hidden states.
        most: tokens of a call.
    """
    from bitsmoe_plugin.runtime.with_originals import WithOriginals

    rows = runtime.runtime if isinstance(runtime, WithOriginals) else runtime
    if find_spec("triton") is None:
        return
    from bitsmoe_plugin.runtime.triton.layer import TritonLayer
    from bitsmoe_plugin.runtime.triton.warm_up import remaining

    if not isinstance(rows, TritonLayer):
        return
    device, size = rows.packed.payload.device, rows.input_basis.columns
    for tokens in remaining(rows, slots, dtype, most):
        ids = torch.zeros(tokens, slots, dtype=torch.int32, device=device)
        runtime.forward(torch.zeros(tokens, size, dtype=dtype, device=device), ids, ids.float())


def _fastest(spec: PackedSpec, packed: PackedExperts, gating: Gating) -> Runtime:
    from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

    device, invariant = packed.payload.device.type, batch_invariance.is_wanted()
    if invariant:
        batch_invariance.refuse_device(device)
    runtime, missing = _on_cpu(spec, packed, gating) if device == "cpu" else _on_gpu(spec, packed, gating)
    if runtime is not None:
        return runtime
    if invariant:
        batch_invariance.refuse_plain_torch(missing)
    warnings.warn(f"packed experts on {device} run in plain torch, much slower: {missing}", stacklevel=2)
    return ReferenceLayer.prepare(spec, packed, gating)


def _lacks_registers(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU on which the kernels would spill 6 to 22 KB for each thread."""
    return (
        device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0)
    )


def _on_cpu(spec: PackedSpec, packed: PackedExperts, gating: Gating) -> tuple[Runtime | None, str]:
    from bitsmoe_plugin.runtime import cpu_layer

    if library() is None:
        return None, absence.reason()
    return cpu_layer.CpuLayer.prepare(spec, packed, gating), ""


def _on_gpu(spec: PackedSpec, packed: PackedExperts, gating: Gating) -> tuple[Runtime | None, str]:
    if find_spec("triton") is None:
        return None, "Triton is not installed"
    if _lacks_registers(packed.payload.device):
        return None, "the GPU kernels need a GPU of compute capability 8.0 or newer"
    from bitsmoe_plugin.runtime.triton.layer import TritonLayer

    form = gating if isinstance(gating, GatingForm) else form_of(gating, spec.shape.has_gate)
    return TritonLayer.prepare(spec, packed, gating if form is None else form), ""
