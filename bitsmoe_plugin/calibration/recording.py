"""What the decoder layers of a model are called with: taken from the model itself, by passes in which the
layers are replaced by recorders that compute nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.blocks import Inputs
from bitsmoe_plugin.errors import QuantizationError

_STATE = ("rope_deltas",)
"""Attributes in which modules of transformers keep something of their last call for the next one."""


class _AllRecordedError(Exception):
    """Ends a pass at the last layer: what comes after needs outputs of layers."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments of each call and computes nothing."""

    def __init__(self, layer: nn.Module, is_last: bool, zeros: bool, answer: Tensor | None = None) -> None:
        super().__init__()
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.received: Tensor | None = None
        self.returned: Tensor | None = None
        self._is_last, self._zeros = is_last, zeros
        self._answer = answer  # the last one puts this out
        self._layer = [layer]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call, self.received = (args, kwargs), hidden
        if self._is_last:
            if self._answer is not None:
                return self._answer
            raise _AllRecordedError
        self.returned = torch.zeros_like(hidden) if self._zeros else hidden
        return self.returned


@dataclass(frozen=True)
class Added:
    """What a model adds to the hidden states between two decoder layers (features of images).

    Attributes:
        rows: ``[n]`` int64, of the hidden states ``[tokens, H]``.
        values: ``[n, H]``.
    """

    rows: Tensor
    values: Tensor

    def to(self, hidden: Tensor) -> Tensor:
        """The hidden states ``[blocks, tokens, H]`` with it added; those given stay."""
        flat = hidden.flatten(0, -2).clone()
        flat[self.rows] += self.values
        return flat.view_as(hidden)


@dataclass
class RecordedCall:
    """One pass.

    Attributes:
        embedded: inputs of the first layer, ``[blocks, tokens, H]``, until they are taken.
        arguments: of each layer, besides the hidden states.
        added: layer -> what is added to the outputs of the one before.
    """

    embedded: Tensor | None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    added: dict[int, Added] = field(default_factory=dict)

    def take_embedded(self) -> Tensor:
        """The inputs of the first layer, once: others change hands and are freed, these would stay."""
        embedded, self.embedded = self.embedded, None
        assert embedded is not None
        return embedded


@torch.no_grad()
def record_call(model: Any, layers: nn.ModuleList, inputs: Inputs) -> RecordedCall:
    """Arguments of the decoder layers in a forward pass; the model is as it was.

    Args:
        model: of transformers; its base model is called.
        inputs: of the base model.

    Raises:
        QuantizationError: between two layers something else happens than an addition.
    """
    recorders = _pass(model, layers, inputs, zeros=False)
    call = RecordedCall(recorders[0].received, [recorder.call for recorder in recorders])
    changed = [index for index in range(1, len(recorders)) if _changed(recorders[index - 1 : index + 1])]
    if changed:
        alone = _pass(model, layers, inputs, zeros=True)
        for index in changed:
            put_out, received = recorders[index - 1].returned, recorders[index].received
            call.added[index] = _added(index, put_out, received, alone[index].received)
    return call


@torch.no_grad()
def after_layers(model: Any, layers: nn.ModuleList, inputs: Inputs, hidden: Tensor) -> Tensor:
    """What the base model puts out if its last decoder layer puts out ``hidden``."""
    device = next(model.parameters()).device
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    base = getattr(model, "base_model", model)
    with _state_kept(model), _recording(layers, False, hidden):
        result: Tensor = base(**on_device, use_cache=False).last_hidden_state
    return result


def _changed(pair: list[_Recorder]) -> bool:
    """Whether a layer gets something else than the one before puts out."""
    before, after = pair
    return after.received is not None and after.received is not before.returned


def _added(index: int, put_out: Any, received: Any, found: Any) -> Added:
    """What comes to zeros, if it also comes to other hidden states.

    Args:
        put_out, received: hidden states before and after.
        found: the same of zeros.
    """
    if found.shape == put_out.shape:
        flat = found.flatten(0, -2)
        rows = torch.nonzero(flat.ne(0).any(-1))[:, 0]
        added = Added(rows, flat[rows].clone())
        if torch.equal(added.to(put_out), received):
            return added
    raise QuantizationError(
        f"the model changes the hidden states between decoder layers {index - 1} and {index} by something "
        "else than an addition, which calibrating layer by layer does not carry"
    )


def _pass(model: Any, layers: nn.ModuleList, inputs: Inputs, zeros: bool) -> list[_Recorder]:
    base = getattr(model, "base_model", model)
    like = next(model.parameters())
    # Pixels in the dtype of the model, as its first product of them wants.
    on_device = {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    with _state_kept(model), _recording(layers, zeros) as recorders:
        try:
            base(**on_device, use_cache=False)
        except _AllRecordedError:
            pass
        except (ValueError, TypeError) as error:  # of taking apart what a recorder put out
            called = [index for index, recorder in enumerate(recorders) if recorder.received is not None]
            if not called:
                raise
            raise QuantizationError(
                f"{type(base).__name__}: after decoder layer {called[-1]} the model takes more than hidden "
                f"states to the next one ({error}), which calibrating layer by layer does not carry; this "
                "model class cannot be quantized"
            ) from error
    return recorders


@contextmanager
def _recording(layers: nn.ModuleList, zeros: bool, answer: Tensor | None = None) -> Iterator[list[_Recorder]]:
    originals = list(layers)
    recorders = [_Recorder(layer, layer is originals[-1], zeros, answer) for layer in originals]
    try:
        for index, recorder in enumerate(recorders):
            layers[index] = recorder
        yield recorders
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """What modules would remember of the pass, and use for positions of the next text, is forgotten."""
    kept = [(m, name, vars(m)[name]) for m in model.modules() for name in _STATE if name in vars(m)]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
