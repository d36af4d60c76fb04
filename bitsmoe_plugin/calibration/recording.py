"""What the decoder layers of a model are called with: taken from the model itself, by passes in which the
layers are replaced by recorders that compute nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.blocks import Inputs
from bitsmoe_plugin.calibration.recorders import (
    Put,
    Recorder,
    not_carried,
    recorded_pass,
    recording,
    state_kept,
)
from bitsmoe_plugin.calibration.returned import Returned, marks_in, wanted_after
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.model_class import text_model

_COUNTS = (1, 2, 3, 4)
"""Of values that layers may return."""


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
        returns: number of values that the model takes from a layer, the hidden states first. ``Returned``
            stands for the others in ``arguments``.
        added: layer -> what is added to the outputs of the one before.
    """

    embedded: Tensor | None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    returns: int
    added: dict[int, Added] = field(default_factory=dict)

    @cached_property
    def wanted(self) -> list[frozenset[Returned]]:
        """Of each layer, see ``wanted_after``."""
        return wanted_after(self.arguments)

    def take_embedded(self) -> Tensor:
        """The inputs of the first layer, once: others change hands and are freed, these would stay."""
        embedded, self.embedded = self.embedded, None
        assert embedded is not None
        return embedded


@torch.no_grad()
def record_call(
    model: Any, layers: nn.ModuleList, inputs: Inputs, returns: int | None = None
) -> RecordedCall:
    """Arguments of the decoder layers in a forward pass; the model is as it was.

    Args:
        model: of transformers; its base model is called.
        inputs: of the base model.
        returns: as of another call of the same model.

    Raises:
        QuantizationError: between two layers something else happens than an addition, or values that layers
            return beside hidden states are not handed on as they are.
    """
    recorders, put = _first_pass(model, layers, inputs, returns)
    arguments = [recorder.call for recorder in recorders]
    call = RecordedCall(recorders[0].received, arguments, put.returns)
    changed = [index for index in range(1, len(recorders)) if _changed(recorders[index - 1 : index + 1])]
    if changed:
        alone = recorded_pass(model, layers, inputs, replace(put, zeros=True))
        for index in changed:
            put_out, received = recorders[index - 1].returned, recorders[index].received
            call.added[index] = _added(index, put_out, received, alone[index].received)
    if returns is None and put.returns > 1:
        _check_handed_on(model, layers, inputs, put, arguments)
    return call


def _first_pass(
    model: Any, layers: nn.ModuleList, inputs: Inputs, returns: int | None
) -> tuple[list[Recorder], Put]:
    """A pass in which layers return as many values as the model takes from them."""
    failed: QuantizationError | None = None
    other_shapes: tuple[list[Recorder], Put] | None = None
    for count in _COUNTS if returns is None else (returns,):
        put = Put(returns=count)
        try:
            recorders = recorded_pass(model, layers, inputs, put)
        except QuantizationError as error:
            failed = failed or error
            continue
        if len({recorder.received.shape for recorder in recorders if recorder.received is not None}) == 1:
            return recorders, put
        other_shapes = other_shapes or (recorders, put)  # a tensor of two blocks was taken for two values?
    if other_shapes is not None:
        return other_shapes
    assert failed is not None
    raise failed


def _check_handed_on(
    model: Any, layers: nn.ModuleList, inputs: Inputs, put: Put, arguments: list[Any]
) -> None:
    """Refuse a model that decides by what a layer returns what the next one is given: every other layer
    returns None, and that must be what later ones are given in its place."""
    for first in range(2):
        silent = frozenset(range(first, len(layers), 2))
        for index, recorder in enumerate(recorded_pass(model, layers, inputs, replace(put, silent=silent))):
            wanted = [mark for mark in marks_in(arguments[index]) if mark.layer not in silent]
            if list(marks_in(recorder.call)) != wanted:
                raise not_carried(model, index - 1, "it depends on what that returns beside them")


def after_layers(
    model: Any, layers: nn.ModuleList, inputs: Inputs, hidden: Tensor, returns: int = 1
) -> Tensor:
    """What the base model puts out if its last decoder layer puts out ``hidden``.

    Args:
        returns: of ``RecordedCall``.
    """
    base = getattr(model, "base_model", model)
    result: Tensor = _called(base, model, layers, inputs, hidden, returns).last_hidden_state
    return result


def logits_after(model: Any, layers: nn.ModuleList, inputs: Inputs, hidden: Tensor, returns: int) -> Tensor:
    """Logits of the model if its last decoder layer puts out ``hidden``; see ``after_layers``."""
    result: Tensor = _called(text_model(model), model, layers, inputs, hidden, returns).logits
    return result


@torch.no_grad()
def _called(
    part: Any, model: Any, layers: nn.ModuleList, inputs: Inputs, hidden: Tensor, returns: int
) -> Any:
    device = next(model.parameters()).device
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    with state_kept(model), recording(layers, Put(returns=returns, last=hidden)):
        return part(**on_device, use_cache=False)


def _changed(pair: list[Recorder]) -> bool:
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
