"""A device that is not there: tensors on the CPU that say they are elsewhere and refuse to be mixed.

What CUDA refuses is refused here, so that code for a GPU can be run, on values, without one: an operation
on tensors of two devices (but for numbers, indices and copies), ``numpy()``, random numbers drawn from a
generator of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from bitsmoe_plugin.base import devices, triton_launch
from bitsmoe_plugin.base.triton_launch import Launch
from bitsmoe_plugin.codec import uniform
from bitsmoe_plugin.codec.backends import gpu

DEVICE = torch.device("meta")
"""The one that needs no initialization; torch asks nobody else about tensors of a subclass."""
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COPIES = ("aten::_to_copy", "aten::copy_")
_TABLES = (uniform.steps, gpu._tables)


def _without_lists(index: Any) -> Any:
    """Lists as tensors; torch would make them on the meta device, without values."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part, device=DEVICE) if isinstance(part, list) else part for part in parts)


class Elsewhere(Tensor):
    """Says that it is on ``DEVICE``; the values are those of ``here``."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here.detach()
        return made

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, *_: Any) -> Any:
        raise AssertionError("numpy() of a tensor that is not on the CPU")

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values; its results are on the device of its operands, or the one asked for."""
    name, tensors = func._schema.name, [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    asked = kwargs.get("device")
    if any(isinstance(t, Elsewhere) for t in tensors) and name not in _COPIES:
        checked = [args[0], *([args[2]] if len(args) > 2 else [])] if name in _INDEXING else tensors
        strangers = [t.shape for t in checked if not isinstance(t, Elsewhere) and t.dim()]
        if strangers:
            raise AssertionError(f"{name}: tensors of shapes {strangers} are on the CPU, others elsewhere")
    if (
        kwargs.get("generator") is not None
        and asked is not None
        and torch.device(asked) != torch.device("cpu")
    ):
        raise AssertionError(f"{name}: a generator of the CPU for a tensor elsewhere")
    moved = asked is not None and torch.device(asked).type == DEVICE.type
    there = moved or (asked is None and any(isinstance(t, Elsewhere) for t in tensors))
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    here = tree_map(lambda t: t.here if isinstance(t, Elsewhere) else t, (args, kwargs))
    result = func(*here[0], **here[1])
    if name == "aten::copy_" or (name.rstrip("_") != name and not name.endswith("__")):
        return args[0]
    wrap = there and name != "aten::_local_scalar_dense"
    return tree_map(lambda t: Elsewhere(t) if wrap and isinstance(t, Tensor) else t, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _run(launch: Launch) -> None:
    """A kernel in Triton's interpreter."""
    tensors = {name: t for name, t in launch.arguments.items() if isinstance(t, Tensor)}
    strangers = [name for name, t in tensors.items() if not isinstance(t, Elsewhere)]
    assert not strangers, f"{launch.kernel}: {strangers} on the CPU"
    here = {name: t.here if isinstance(t, Elsewhere) else t for name, t in launch.arguments.items()}
    with torch.device("cpu"):
        launch.kernel[launch.launch_grid](**here, **launch.constants)


def _with_values(make: Any) -> Any:
    """``torch.tensor`` or ``as_tensor``, which make tensors on the meta device without asking for values."""

    def made(data: Any, **options: Any) -> Tensor:
        device = options.pop("device", None) or (
            data.device if isinstance(data, Tensor) else torch.empty(0).device
        )
        with torch.device("cpu"):
            result: Tensor = data if isinstance(data, Tensor) else make(data, **options)
        return result.to(device)

    return made


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch, triton: bool) -> Iterator[torch.device]:
    """The device, while this is entered; with or without its Triton kernels."""
    monkeypatch.setattr(
        "bitsmoe_plugin.spectral.layer_problem.working_set", lambda _: devices.CPU_WORKING_SET
    )
    monkeypatch.setattr(gpu, "_INTERPRETED_BLOCKS", 32)
    monkeypatch.setattr(
        gpu, "available", lambda *ts: triton and all(t.device.type == DEVICE.type for t in ts)
    )
    monkeypatch.setattr(triton_launch, "run", _run)
    with torch.device("cpu"):  # torch remembers, once, which of its functions make tensors; not ours
        torch.empty(0)
    monkeypatch.setattr(torch, "tensor", _with_values(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", _with_values(torch.as_tensor))
    for cached in _TABLES:
        cached.cache_clear()
    with _Mode():
        yield DEVICE
    for cached in _TABLES:
        cached.cache_clear()
