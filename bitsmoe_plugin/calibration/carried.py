"""Hidden states on their way through the decoder layers, and what layers leave beside them for later ones."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.calibration.returned import Returned, replaced
from bitsmoe_plugin.errors import QuantizationError

Left = dict[str, tuple[Tensor, ...]]
"""What layers put into a mapping that all of them are called with (keys and values that later layers share),
or return beside hidden states: tensors ``[blocks, ...]``."""


class Carried(list[Tensor]):
    """Hidden states ``[blocks, tokens, H]``, batch by batch.

    Each of the streams that go through the layers (of the unquantized model, of the quantized one) has what
    its own layers left.

    Attributes:
        left: of every batch; ``argument/key`` (or ``Returned.key``) -> tensors.
    """

    def __init__(self, hidden: Iterable[Tensor], left: Sequence[Left] = ()) -> None:
        super().__init__(hidden)
        self.left = list(left) or [{} for _ in self]


def left_beside(hidden: list[Tensor]) -> list[Left]:
    """What layers left beside hidden states, for every batch."""
    return hidden.left if isinstance(hidden, Carried) else [{} for _ in hidden]


def first_batches(hidden: list[Tensor], count: int) -> Carried:
    """The first batches, with what belongs to them."""
    return Carried(hidden[:count], left_beside(hidden)[:count])


def copied(hidden: list[Tensor]) -> Carried:
    """Hidden states and what belongs to them, in memory of their own."""
    left = [
        {key: tuple(tensor.clone() for tensor in tensors) for key, tensors in batch.items()}
        for batch in left_beside(hidden)
    ]
    return Carried((tensor.clone() for tensor in hidden), left)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a call: positional ones, and those by name."""


def with_left(arguments: Arguments, left: Left, blocks: slice) -> tuple[Arguments, dict[str, Any]]:
    """Arguments of a layer, with mappings of its own in the place of those that the model made empty: a layer
    reads there what layers before it left; and with what those returned in the place of its marks.

    Args:
        blocks: those that the layer is given.

    Returns:
        the arguments, and those of them that are such mappings.
    """
    args, kwargs = replaced(arguments, lambda mark: _one(left.get(mark.key), blocks))
    places = {
        name: _filled(name, value, left, blocks)
        for name, value in kwargs.items()
        if isinstance(value, MutableMapping) and not value
    }
    return (args, {**kwargs, **places}), places


def _one(tensors: tuple[Tensor, ...] | None, blocks: slice) -> Tensor | None:
    return None if tensors is None else tensors[0][blocks]


def _filled(name: str, place: Any, left: Left, blocks: slice) -> Any:
    own, start = type(place)(), f"{name}/"
    for key, tensors in left.items():
        if key.startswith(start):
            own[key.removeprefix(start)] = tuple(tensor[blocks] for tensor in tensors)
    return own


def left_in(places: dict[str, Any], index: int, blocks: int) -> Left:
    """What a layer and those before it left in its mappings.

    Args:
        index: of the layer.
        blocks: that it was given.

    Raises:
        QuantizationError: something else than tensors with one entry per block.
    """
    found: Left = {}
    for name, place in places.items():
        for key, tensors in place.items():
            if not isinstance(key, str) or not _are_of_blocks(tensors, blocks):
                raise QuantizationError(
                    f"decoder layer {index} leaves {key!r} in {name} for later ones, which is no tuple of "
                    f"tensors of {blocks} blocks; calibrating layer by layer does not carry it, and this "
                    "model class cannot be quantized"
                )
            found[f"{name}/{key}"] = tensors
    return found


def left_returned(output: Any, wanted: Iterable[Returned], before: Left, index: int, blocks: slice) -> Left:
    """What later layers are given of the values that a layer and those before it returned; one that is None
    is left out.

    Args:
        output: of the layer.
        before: what the latter left, for the whole batch.
        index: of the layer.
        blocks: that it was given.

    Raises:
        QuantizationError: something else than a tensor with one entry per block.
    """
    found: Left = {}
    for mark in wanted:
        if mark.layer < index:
            value = _one(before.get(mark.key), blocks)
        else:
            value = _returned(output, mark.position, index)
        if value is not None:
            found[mark.key] = (value,)
    return found


def _returned(output: Any, position: int, index: int) -> Tensor | None:
    values = output if isinstance(output, tuple) else (output,)
    value: Any = values[position] if position < len(values) else f"{len(values)} value(s)"
    if value is None or (isinstance(value, Tensor) and _are_of_blocks((value,), len(values[0]))):
        return value
    kind = value if isinstance(value, str) else type(value).__name__
    raise QuantizationError(
        f"decoder layer {index} returns {kind} where later ones take a tensor of {len(values[0])} blocks "
        "beside the hidden states; calibrating layer by layer does not carry it, and this model class cannot "
        "be quantized"
    )


def _are_of_blocks(found: Any, blocks: int) -> bool:
    return isinstance(found, tuple) and all(
        isinstance(tensor, Tensor) and tensor.shape[:1] == (blocks,) for tensor in found
    )


def joined(parts: list[Left]) -> Left:
    """What was left in calls for parts of a batch, of all of it; contiguous, as files return it.

    Raises:
        QuantizationError: not the same of all parts.
    """
    if len(parts) == 1:
        return {key: tuple(tensor.contiguous() for tensor in tensors) for key, tensors in parts[0].items()}
    if any(part.keys() != parts[0].keys() for part in parts):
        raise QuantizationError(
            "decoder layers leave something for later ones with some calibration blocks alone, which "
            "calibrating layer by layer does not carry; this model class cannot be quantized"
        )
    return {
        key: tuple(torch.cat(tensors) for tensors in zip(*(part[key] for part in parts), strict=True))
        for key in parts[0]
    }
