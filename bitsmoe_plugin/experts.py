"""The runtime module that takes the place of a model's routed experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin import kernels
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.families import apply_gating, layout_of
from bitsmoe_plugin.packed_spec import PackedSpec
from bitsmoe_plugin.packing import PackedExperts


class BitsMoEExperts(nn.Module):
    """Routed experts computed from their packed tensors; called like the module it replaces."""

    def __init__(self, original: nn.Module, spec: PackedSpec) -> None:
        """
        Args:
            original: the fused experts module, for its gating.
            spec: sizes of the buffers, which are created uninitialised on the meta device.
        """
        super().__init__()
        self.spec = spec
        self.num_experts = spec.shape.num_experts
        # In a tuple, so that it is no submodule and its parameters are not ours.
        self._original = (original,)
        for name, (dtype, shape) in spec.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self._runtime: kernels.Runtime | None = None

    def drop_original_weights(self) -> None:
        """Free the parameters of the replaced module; its gating stays."""
        for name in list(dict(self._original[0].named_parameters(recurse=False))):
            delattr(self._original[0], name)

    def load_packed(self, packed: PackedExperts) -> None:
        """Fill the buffers."""
        for name, tensor in packed.tensors():
            self._buffers[name] = tensor

    def packed(self) -> PackedExperts:
        """The packed tensors as they are stored."""
        return PackedExperts(
            **{name.removeprefix("bitsmoe_"): self.get_buffer(name) for name in self.spec.tensors()}
        )

    def verify(self, name: str) -> None:
        """Refuse tensors that do not fit the spec; their values are checked by ``validation``.

        Args:
            name: module path, for errors.

        Raises:
            CheckpointError: naming the tensor and both values.
        """
        for buffer, (dtype, shape) in self.spec.tensors().items():
            tensor = self.get_buffer(buffer)
            if tensor.is_meta:
                raise CheckpointError(f"{name}.{buffer} is missing from the checkpoint")
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{name}.{buffer} is {tensor.dtype} {tuple(tensor.shape)}, but the config asks for "
                    f"{dtype} {shape}; the checkpoint was altered or belongs to another config"
                )

    def compute_by(self, runtime: kernels.Runtime | None) -> None:
        """Compute by another runtime of the same packed tensors; None: by the fastest, as ever."""
        self._runtime = runtime

    def gating(self, gate: Tensor, up: Tensor) -> Tensor:
        """``[..., I]`` of gate's and up's outputs alike, as the replaced module has it."""
        return apply_gating(self._original[0], gate, up)

    def _prepare(self) -> kernels.Runtime:
        packed, runtime = self.packed(), self._runtime
        # Buffers are other tensors after a move to a device or a load.
        if runtime is None or any(
            a is not b for (_, a), (_, b) in zip(packed.tensors(), runtime.packed.tensors(), strict=True)
        ):
            runtime = self._runtime = kernels.prepare(self.spec, packed, self.gating)
        return runtime

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """``[T, H]`` from ``[T, H]`` and, as routing, ``[T, k]`` and ``[T, k]``, see ``kernels``.

        ``[E * T, H]`` from ``[E * T, H]`` for families that pass one copy per expert (``families.Layout``).
        """
        if layout_of(self._original[0]).takes_copies:
            return self._forward_copies(hidden_states)
        top_k_index, top_k_weights = routing
        return self._prepare().forward(hidden_states, top_k_index, top_k_weights)

    def _forward_copies(self, copies: Tensor) -> Tensor:
        """Each copy that is not zero is a token of its own."""
        tokens = len(copies) // self.num_experts
        rows = torch.nonzero(copies.ne(0).any(-1)).flatten()
        out = torch.zeros_like(copies)
        experts = (rows // tokens)[:, None]
        out[rows] = self._prepare().forward(
            copies[rows], experts, torch.ones_like(experts, dtype=copies.dtype)
        )
        return out

    def extra_repr(self) -> str:
        shape = self.spec.shape
        bits = self.packed().stored_bits() / shape.weights
        return (
            f"num_experts={shape.num_experts}, hidden_size={shape.hidden_size}, "
            f"intermediate_size={shape.intermediate_size}, bits_per_weight={bits:.3f}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_runtime": None}  # it holds pointers

    def __deepcopy__(self, memo: dict[int, Any]) -> BitsMoEExperts:
        copy = BitsMoEExperts(self._original[0], self.spec)
        for name, tensor in self.packed().tensors():
            copy._buffers[name] = tensor.clone()
        return copy


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at path ``name`` of ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
