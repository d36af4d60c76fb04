"""Numbers of tokens by which all kernels are launched that a layer ever needs, to compile them beforehand.

Triton compiles a kernel when it is first launched, anew for other constants and for integers that are 1 or
multiples of 16. That takes seconds, for which a request would wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch
from bitsmoe_plugin.runtime.triton.layer import TritonLayer

_EACH = 160
"""Up to so many tokens each number is looked at, beyond only those at which sizes double, and the number
before: kernels are chosen by ranges whose ends are at least twice their beginnings."""


_COMPILED: set[Any] = set()
"""Layers whose kernels were compiled in this process: those of a model are of few kinds."""


def remaining(layer: TritonLayer, slots: int, dtype: torch.dtype, most: int) -> list[int]:
    """``numbers_of_tokens`` of a layer, none if another of the same sizes was asked for before."""
    ends = (tuple(compiled(layer, slots, dtype, tokens)) for tokens in (1, most))
    key = (layer.packed.payload.device, most, *ends)
    if key in _COMPILED:
        return []
    _COMPILED.add(key)
    return numbers_of_tokens(layer, slots, dtype, most)


def numbers_of_tokens(layer: TritonLayer, slots: int, dtype: torch.dtype, most: int) -> list[int]:
    """Rising numbers of tokens, each of which launches what those before it do not.

    Nothing is launched and no device is asked.

    Args:
        slots: experts per token.
        dtype: of the hidden states.
        most: tokens of a call.
    """
    known: set[Any] = set()
    chosen = []
    for tokens in _candidates(most):
        new = set(compiled(layer, slots, dtype, tokens)) - known
        if new:
            known |= new
            chosen.append(tokens)
    return chosen


def compiled(layer: TritonLayer, slots: int, dtype: torch.dtype, tokens: int) -> list[Any]:
    """What Triton tells apart of the launches for ``tokens`` tokens, as values that can be compared."""
    hidden = torch.empty(tokens, layer.input_basis.columns, dtype=dtype, device="meta")
    ids = torch.empty(tokens, slots, dtype=torch.int32, device="meta")
    recorded: list[Launch] = []
    layer.forward(hidden, ids, ids.float(), recorded.append)
    return [_kind(launch) for launch in recorded]


def _kind(launch: Launch) -> tuple[Any, ...]:
    arguments = tuple((name, _argument(value)) for name, value in sorted(launch.arguments.items()))
    constants = tuple((name, str(value)) for name, value in sorted(launch.constants.items()))
    return launch.kernel.__name__, arguments, constants, launch.num_warps, launch.num_stages


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)


def _candidates(most: int) -> Iterator[int]:
    yield from range(1, min(most, _EACH) + 1)
    size = _EACH
    while size < most:
        size = min(2 * size, most)
        yield from (tokens for tokens in (size - 1, size) if tokens > _EACH)
