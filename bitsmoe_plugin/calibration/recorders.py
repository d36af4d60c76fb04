"""Passes of a model whose decoder layers are replaced by recorders that compute nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.blocks import Inputs
from bitsmoe_plugin.calibration.returned import Returned
from bitsmoe_plugin.errors import QuantizationError

_STATE = ("rope_deltas",)
"""Attributes in which modules of transformers keep something of their last call for the next one."""


class _AllRecordedError(Exception):
    """Ends a pass at the last layer: what comes after needs outputs of layers."""


@dataclass(frozen=True)
class Put:
    """What recorders put out.

    Attributes:
        zeros: in the place of the hidden states that they are given.
        returns: number of values, the hidden states first.
        silent: numbers of layers that return None beside hidden states.
        last: hidden states that the last one puts out; None: the pass ends there.
    """

    zeros: bool = False
    returns: int = 1
    silent: frozenset[int] = frozenset()
    last: Tensor | None = None


class Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments of each call and computes nothing."""

    def __init__(self, layer: nn.Module, index: int, is_last: bool, put: Put) -> None:
        super().__init__()
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.received: Tensor | None = None
        self.returned: Tensor | None = None
        self._index, self._is_last, self._put = index, is_last, put
        self._layer = [layer]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call, self.received = (args, kwargs), hidden
        if self._is_last and self._put.last is None:
            raise _AllRecordedError
        self.returned = torch.zeros_like(hidden) if self._put.zeros else hidden
        if self._is_last:
            self.returned = self._put.last
        if self._put.returns == 1:
            return self.returned
        is_silent = self._index in self._put.silent
        beside = [None if is_silent else Returned(self._index, p) for p in range(1, self._put.returns)]
        return (self.returned, *beside)


def recorded_pass(model: Any, layers: nn.ModuleList, inputs: Inputs, put: Put) -> list[Recorder]:
    """What decoder layers are given in a forward pass; the model is as it was.

    Raises:
        QuantizationError: the model cannot go on with what recorders put out.
    """
    base = getattr(model, "base_model", model)
    like = next(model.parameters())
    # Pixels in the dtype of the model, as its first product of them wants.
    on_device = {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    with state_kept(model), recording(layers, put) as recorders:
        try:
            base(**on_device, use_cache=False)
        except _AllRecordedError:
            pass
        except (ValueError, TypeError, AttributeError) as error:  # of what a recorder put out
            called = [index for index, recorder in enumerate(recorders) if recorder.received is not None]
            if not called:
                raise
            raise not_carried(model, called[-1], str(error)) from error
    return recorders


def not_carried(model: Any, index: int, reason: str) -> QuantizationError:
    """Of what a model hands on from decoder layer ``index``."""
    return QuantizationError(
        f"{type(getattr(model, 'base_model', model)).__name__}: after decoder layer {index} the model takes "
        f"more than hidden states to the next one ({reason}), which calibrating layer by layer does not "
        "carry; this model class cannot be quantized"
    )


@contextmanager
def recording(layers: nn.ModuleList, put: Put) -> Iterator[list[Recorder]]:
    """Inside, recorders are in the place of the layers."""
    originals = list(layers)
    recorders = [Recorder(layer, index, layer is originals[-1], put) for index, layer in enumerate(layers)]
    try:
        for index, recorder in enumerate(recorders):
            layers[index] = recorder
        yield recorders
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """What modules would remember of the pass, and use for positions of the next text, is forgotten."""
    kept = [(m, name, vars(m)[name]) for m in model.modules() for name in _STATE if name in vars(m)]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
