"""Parameters of packed experts, and how tensors that vLLM hands over reach them.

Sizes of packed tensors are known only once their row codes are read, and those of a later checkpoint differ.
So no tensor is copied into a parameter: it is handed on whole, and a layer changes once it has all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitsmoe_plugin.errors import CheckpointError
from vllm_ext.stream_names import buffer_name


class Receiver(Protocol):
    """Takes the packed tensors of one layer."""

    @property
    def name(self) -> str:
        """Of the layer, for errors."""

    def receive(self, buffer: str, tensor: Tensor, *, reloading: bool) -> None:
        """A whole packed tensor; ``reloading`` if vLLM will say when the last of a reload has come."""

    def refuse(self, tensor_name: str) -> None:
        """Raise for a tensor that is none of the layer's, unless it can be passed over."""

    def written(self, buffer: str) -> None:
        """Values of a parameter were written in place."""

    def exposed(self) -> None:
        """Values of a parameter may be written in place, and it will not tell."""


class PackedParameter(nn.Parameter):
    """A packed tensor in use. ``copy_`` takes a tensor of the same dtype and shape only, and reports it.

    vLLM's reload in kernel format and other engines of weight updates write this way.
    """

    buffer: str
    receiver: Receiver
    weight_loader: Callable[[Tensor, Tensor], None]

    def __new__(cls, data: Tensor, buffer: str, receiver: Receiver) -> PackedParameter:
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.buffer, parameter.receiver = buffer, receiver
        parameter.weight_loader = loader(receiver, buffer)
        return parameter

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Shares memory but not the count of writes, by which they are noticed."""
        self.receiver.exposed()
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Raises CheckpointError for a tensor of another dtype or shape, or values that are not sound."""
        if (source.dtype, source.shape) != (self.dtype, self.shape):
            raise CheckpointError(
                f"{self.receiver.name}.{self.buffer} is {self.dtype} {tuple(self.shape)} and cannot take "
                f"{source.dtype} {tuple(source.shape)}; reload whole packed layers in checkpoint format"
            )
        with torch.no_grad():
            super().copy_(source, non_blocking)
        self.receiver.written(self.buffer)
        return self


def placeholder(receiver: Receiver, buffer: str) -> nn.Parameter:
    """Stands for a packed tensor while weights are loaded or reloaded.

    It has one element, because vLLM's reload counts elements to know when a layer has all of its tensors.
    """
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    parameter.weight_loader = loader(receiver, buffer)  # type: ignore[attr-defined]
    return parameter


def loader(receiver: Receiver, buffer: str) -> Callable[[Tensor, Tensor], None]:
    """The ``weight_loader`` of a parameter; vLLM asks for these names of its arguments."""

    def weight_loader(param: Tensor, loaded_weight: Tensor) -> None:
        if param.is_meta:  # in a reload: counted now, called again with the tensors of the whole layer
            param.copy_(torch.zeros_like(param))
            return
        receiver.receive(buffer, loaded_weight, reloading=not isinstance(param, PackedParameter))

    return weight_loader


def layer_loader(layer: nn.Module, receiver: Receiver) -> Callable[[Iterable[tuple[str, Tensor]]], Any]:
    """``load_weights`` of a layer: gives tensors to its parameters and yields the names that it used."""
    reference = weakref.ref(layer)  # vLLM keeps loaders longer than layers

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        parameters = reference()._parameters  # type: ignore[union-attr]
        for name, tensor in weights:
            buffer = buffer_name(name)
            parameter = parameters.get(buffer)
            if parameter is None or not buffer.startswith("bitsmoe_"):
                receiver.refuse(name)
            else:
                parameter.weight_loader(parameter, tensor)  # type: ignore[union-attr]
            yield buffer

    return load_weights
