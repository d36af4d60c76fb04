"""Packed experts in use: their parameters, and a runtime that follows what is written into them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from bitsmoe_plugin.codec import packed_values
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.models.gating import Gating
from bitsmoe_plugin.runtime import dispatch
from vllm_ext.derived_state import derived_tensors, update_derived
from vllm_ext.expert_parameters import PackedParameter, Receiver


class LoadedExperts:
    """This process's shard of one layer.

    Attributes:
        parameters: buffer name -> packed tensor. The objects stay the same ones over reloads, because vLLM
            puts them back into the layer after one; those that a later checkpoint lacks are empty.
        spec: sizes, None before anything is loaded.

    Args:
        layer: for its name, and told what is written into parameters.
        gating: of the experts.
        in_place: write into the tensors there are as long as sizes stay: on a GPU their memory is vLLM's to
            free and bring back.
        captured: CUDA graphs are made of the model, which hold addresses.
    """

    def __init__(self, layer: Receiver, gating: Gating, *, in_place: bool, captured: bool) -> None:
        self.parameters: dict[str, PackedParameter] = {}
        self.spec: PackedSpec | None = None
        self._layer = layer
        self._gating = gating
        self._in_place = in_place
        self._captured = captured
        self._runtime: dispatch.Runtime | None = None
        self._usable = False
        self._versions: list[tuple[int, int]] = []
        self._rows = b""
        self._is_exposed = False

    def withdraw(self) -> None:
        """Compute nothing until there are other tensors: the ones at hand are not those that are wanted."""
        self._usable = False

    def replace(self, spec: PackedSpec, tensors: dict[str, Tensor]) -> None:
        """Compute from other tensors, verified ones.

        Args:
            spec: sizes of the shard.
            tensors: buffer name -> tensor of the shard, on its device.

        Raises:
            ConfigError: they are of other sizes than those that CUDA graphs were made for.
        """
        if self._captured and self.spec not in (None, spec):
            raise ConfigError(
                f"{self._layer.name}: CUDA graphs were made for {_sizes(self.spec)}, the new experts have "
                f"{_sizes(spec)}; restart vLLM, or start it with --enforce-eager to reload other sizes"
            )
        in_place = self._in_place and spec == self.spec
        for buffer, tensor in tensors.items():
            parameter = self.parameters.get(buffer)
            if parameter is None:
                self.parameters[buffer] = PackedParameter(tensor, buffer, self._layer)
            elif in_place:
                parameter.detach().copy_(tensor)
            else:
                parameter.data = tensor
        for buffer in self.parameters.keys() - tensors.keys():
            self.parameters[buffer].data = self.parameters[buffer].new_empty(0)
        self.spec = spec
        self._derive(in_place)

    def derive(self) -> None:
        """Follow what was written into the parameters.

        Raises:
            CheckpointError: it is no sound layer.
        """
        assert self.spec is not None
        self._usable = False
        packed_values.check_packed(self._layer.name, self.spec, self._packed())
        self._derive(in_place=self._in_place)

    def written(self, buffer: str) -> None:
        """Follow at once what was written into one parameter; other ones may still be without values.

        Raises:
            CheckpointError: row codes that do not describe the payload.
        """
        if buffer != "bitsmoe_row_codes" or self.spec is None:
            return  # used as it stands
        self._usable = False
        self.spec.check_rows(self._layer.name, self.parameters[buffer])
        if self._in_place:
            self._derive(in_place=True)
        self._usable, self._versions = True, []  # ``forward`` looks at the rest

    def exposed(self) -> None:
        """Look at the row codes before they are used next: all that is derived follows from them."""
        self._is_exposed = True

    def derived(self) -> dict[str, Tensor]:
        """Name -> tensor that was derived from the parameters; stays where it is if CUDA graphs hold it."""
        return {} if self._runtime is None else derived_tensors(self._runtime)

    def warm_up(self, slots: int, dtype: torch.dtype, most: int) -> None:
        """See ``dispatch.warm_up``."""
        assert self._runtime is not None
        dispatch.warm_up(self._runtime, slots, dtype, most)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """See ``dispatch.Runtime``.

        Raises:
            CheckpointError: a reload failed, or what was written into parameters is no sound layer.
        """
        if not self._usable:
            raise CheckpointError(
                f"{self._layer.name}: the last update of its packed experts was refused; load sound ones"
            )
        if self._versions != self._state() or self._has_other_rows():
            self.derive()
        assert self._runtime is not None
        return self._runtime.forward(x, topk_ids, topk_weights)

    def _derive(self, in_place: bool) -> None:
        assert self.spec is not None
        fresh = dispatch.prepare(self.spec, self._packed(), self._gating)
        if self._captured and dispatch.is_plain_torch(fresh):
            raise ConfigError(
                f"{self._layer.name}: these experts are computed in plain torch, which cannot be captured in "
                "CUDA graphs; start vLLM with --enforce-eager"
            )
        if in_place and self._runtime is not None:
            update_derived(self._layer.name, self._runtime, fresh)
        else:
            self._runtime = fresh
        self._versions, self._usable = self._state(), True
        self._rows, self._is_exposed = self._row_digest(), False

    def _packed(self) -> PackedExperts:
        assert self.spec is not None
        return PackedExperts(
            **{b.removeprefix("bitsmoe_"): self.parameters[b].detach() for b in self.spec.tensors()}
        )

    def _has_other_rows(self) -> bool:
        if not self._is_exposed or self._captured:  # what is captured must not wait for the device
            return False
        self._is_exposed = False
        return self._rows != self._row_digest()

    def _row_digest(self) -> bytes:
        codes = self.parameters["bitsmoe_row_codes"].detach()
        return hashlib.sha256(codes.cpu().contiguous().numpy().data).digest()

    def _state(self) -> list[tuple[int, int]]:
        """Where the tensors are and how often they were written, which costs no look at their values."""
        return [(tensor.data_ptr(), tensor._version) for tensor in self.parameters.values()]


def _sizes(spec: PackedSpec | None) -> str:
    return "none" if spec is None else f"{spec.payload_words} payload words and {len(spec.tensors())} tensors"
