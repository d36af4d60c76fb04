"""What runtimes derive from packed tensors, kept as long as these are the same tensors, unchanged.

Offsets follow from the row codes, and the kernels trust them. Tensors may be replaced or written to at any
time (``load_state_dict``, ``copy_``, a move to a device), by values from anywhere: so at each call identity,
address and version of every tensor are compared with those that the state was derived from, and a new state
is derived from checked tensors only. Writes past torch's version counter (``tensor.data.copy_``) need no new
state but to row codes, and those are seen on a CPU, by comparing bytes, once a call has some tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bitsmoe_plugin.codec import packed_values
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.gating import Gating
from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.layer_kind import LayerKind, gating_of
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

COMPARED_FROM = 16
"""Tokens of a call from which on row codes are compared byte by byte, next to nothing beside its work."""


@dataclass(frozen=True)
class LayerState:
    """Attributes:
    spec: sizes.
    packed: what it was derived from: aliases of the given tensors, but row codes on a CPU, which are a copy,
        so that offsets always belong to the row codes next to them.
    gating: of the experts.
    runtime: computes the layer.
    """

    spec: PackedSpec
    packed: PackedExperts
    gating: Gating
    runtime: dispatch.Runtime

    @cached_property
    def reference(self) -> ReferenceLayer:
        """Decodes the rows."""
        return ReferenceLayer.prepare(self.spec, self.packed, self.gating)


@dataclass
class _Entry:
    kind: str
    state: LayerState
    seen: list[tuple[weakref.ref[Tensor], int, int]] = field(default_factory=list)

    def is_of(self, tensors: Sequence[Tensor], kind: str, tokens: int) -> bool:
        if self.kind != kind or len(self.seen) != len(tensors):
            return False
        for tensor, (seen, version, address) in zip(tensors, self.seen, strict=True):
            if seen() is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        if tokens < COMPARED_FROM or tensors[0].device.type != "cpu":
            return True
        return np.array_equal(tensors[0].numpy(), self.state.packed.row_codes.numpy())


class LayerStates:
    """The states of all layers of a process, by their row codes; they go when the tensors go."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, kind: str, tensors: Sequence[Tensor], tokens: int) -> LayerState:
        """The state of a layer, derived anew if the tensors are not those it was derived from.

        Args:
            kind: text of the layer's ``LayerKind``.
            tensors: of the layer, in the order of ``PackedSpec.tensors``; the row codes are the first.
            tokens: of the call.

        Raises:
            CheckpointError: the tensors do not fit the kind, or one another.
            ConfigError: the kind is of another process.
        """
        entry = self._entries.get(id(tensors[0])) if tensors else None
        if entry is not None and entry.is_of(tensors, kind, tokens):
            return entry.state
        with torch.no_grad():
            state = _derive(LayerKind.parse(kind), tensors)
        # What happens to inference tensors leaves no trace: they are looked at in each call.
        if not any(tensor.is_inference() for tensor in tensors):
            self._keep(kind, tensors, state)
        return state

    def _keep(self, kind: str, tensors: Sequence[Tensor], state: LayerState) -> None:
        key = id(tensors[0])

        def forget(_: object) -> None:
            self._entries.pop(key, None)

        entry = _Entry(kind, state)
        entry.seen = [(weakref.ref(t, forget), t._version, t.data_ptr()) for t in tensors]
        self._entries[key] = entry


STATES = LayerStates()


def _derive(kind: LayerKind, tensors: Sequence[Tensor]) -> LayerState:
    """From tensors that are checked first. Waits for the device."""
    spec, packed = kind.bind([tensor.detach() for tensor in tensors])
    packed_values.check_sizes("packed experts", spec, packed)
    for name, tensor in packed.tensors():
        if tensor.device != packed.payload.device:
            raise CheckpointError(f"{name} is on {tensor.device}, the payload on {packed.payload.device}")
    packed = PackedExperts(**{n.removeprefix("bitsmoe_"): t.contiguous() for n, t in packed.tensors()})
    if packed.payload.device.type == "cpu":
        packed = replace(packed, row_codes=packed.row_codes.clone())
    packed_values.check_packed("packed experts", spec, packed)
    gating = gating_of(kind.gating)
    return LayerState(spec, packed, gating, dispatch.prepare(spec, packed, gating))
