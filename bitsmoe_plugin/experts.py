"""The runtime module that takes the place of a model's routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin import packing
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.families import apply_gating
from bitsmoe_plugin.kernels.reference import moe_forward
from bitsmoe_plugin.packing import LayerShape, PackedExperts, RowIndex


@dataclass(frozen=True)
class PackedSpec:
    """What fixes dtype and shape of every packed tensor of a layer.

    Attributes:
        shape: of the unquantized layer.
        widths: of the config, in its order.
        basis_bits: 4, 8 or 16.
        basis_group_size: values per basis scale.
        input_bases: 1 for gate and up together, 2 for one each.
        payload_words: length of the payload.
        grid: of the rows, see ``coding``.
    """

    shape: LayerShape
    widths: tuple[int, ...]
    basis_bits: int
    basis_group_size: int
    input_bases: int
    payload_words: int
    grid: str

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every stored tensor, see ``packing``."""
        e, h, r = self.shape.num_experts, self.shape.hidden_size, self.shape.rank
        dense = self.basis_bits == 16
        basis = torch.int16 if dense else torch.int32

        def width(columns: int) -> int:
            return columns if dense else -(-columns // packing.BLOCK) * self.basis_bits

        def groups(columns: int) -> int:
            return columns // self.basis_group_size

        return {
            "bitsmoe_row_codes": (torch.uint8, (3, e, r)),
            "bitsmoe_scale_grid": (torch.int16, (3, 2, r)),
            "bitsmoe_payload": (torch.int32, (self.payload_words,)),
            "bitsmoe_input_basis": (basis, (self.input_bases * r, width(h))),
            "bitsmoe_input_scales": (torch.int16, (0,) if dense else (self.input_bases * r, groups(h))),
            "bitsmoe_output_basis": (basis, (h, width(r))),
            "bitsmoe_output_scales": (torch.int16, (0,) if dense else (h, groups(r))),
        }


@dataclass(frozen=True)
class _Prepared:
    """What the forward pass derives once from the packed tensors, on one device."""

    index: RowIndex
    scales: Tensor


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
        self._prepared: _Prepared | None = None

    def drop_original_weights(self) -> None:
        """Free the parameters of the replaced module; its gating stays."""
        for name in list(dict(self._original[0].named_parameters(recurse=False))):
            delattr(self._original[0], name)

    def load_packed(self, packed: PackedExperts) -> None:
        """Fill the buffers."""
        for name, tensor in packed.tensors():
            self._buffers[name] = tensor
        self._prepared = None

    def packed(self) -> PackedExperts:
        """The packed tensors as they are stored."""
        return PackedExperts(
            **{name.removeprefix("bitsmoe_"): self.get_buffer(name) for name in self.spec.tensors()}
        )

    def verify(self, name: str) -> None:
        """Refuse tensors that do not fit the spec or each other.

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
        row_codes = self.get_buffer("bitsmoe_row_codes")
        if int(row_codes.max()) // packing.SCALE_LEVELS >= len(self.spec.widths):
            raise CheckpointError(f"{name}.bitsmoe_row_codes holds a width that the config lacks")
        words = packing.index_rows(row_codes, self.spec.widths, self.spec.shape).words
        if words != self.spec.payload_words:
            raise CheckpointError(
                f"{name}: row codes describe {words} payload words, the config {self.spec.payload_words}"
            )

    def _gating(self, gate: Tensor, up: Tensor) -> Tensor:
        return apply_gating(self._original[0], gate, up)

    def _prepare(self) -> _Prepared:
        row_codes, grid = self.get_buffer("bitsmoe_row_codes"), self.get_buffer("bitsmoe_scale_grid")
        if self._prepared is None or self._prepared.scales.device != row_codes.device:
            self._prepared = _Prepared(
                packing.index_rows(row_codes, self.spec.widths, self.spec.shape),
                packing.row_scales(row_codes, grid),
            )
        return self._prepared

    def _basis(self, part: str) -> Tensor:
        words, scales = self.get_buffer(f"bitsmoe_{part}_basis"), self.get_buffer(f"bitsmoe_{part}_scales")
        return packing.unpack_basis(words, scales, self.spec.basis_bits, self.spec.shape.hidden_size)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]`` from ``[T, H]``, ``[T, k]`` and ``[T, k]``, see ``kernels.reference``."""
        prepared = self._prepare()
        return moe_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            payload=self.get_buffer("bitsmoe_payload"),
            index=prepared.index,
            scales=prepared.scales,
            input_basis=self._basis("input"),
            output_basis=self._basis("output"),
            intermediate_size=self.spec.shape.intermediate_size,
            grid=self.spec.grid,
            gating=self._gating,
        )

    def extra_repr(self) -> str:
        shape = self.spec.shape
        bits = self.packed().stored_bits() / shape.weights
        return (
            f"num_experts={shape.num_experts}, hidden_size={shape.hidden_size}, "
            f"intermediate_size={shape.intermediate_size}, bits_per_weight={bits:.3f}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> BitsMoEExperts:
        copy = BitsMoEExperts(self._original[0], self.spec)
        copy.load_packed(PackedExperts(*(tensor.clone() for _, tensor in self.packed().tensors())))
        return copy


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at path ``name`` of ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
