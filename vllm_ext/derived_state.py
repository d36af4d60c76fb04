"""What a runtime derives from its packed tensors, kept at its addresses: CUDA graphs read it there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.runtime.dispatch import Runtime


def derived_tensors(runtime: Runtime) -> dict[str, Tensor]:
    """Name -> tensor of a runtime that is no packed tensor, nor a view of one."""
    stored = {tensor.untyped_storage().data_ptr() for _, tensor in runtime.packed.tensors()}
    return {
        name: tensor
        for name, tensor in _tensors(runtime, "")
        if tensor.untyped_storage().data_ptr() not in stored
    }


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name), f"{path}_{field.name}".lstrip("_"))


def update_derived(name: str, runtime: Runtime, fresh: Runtime) -> None:
    """Copy what ``fresh`` derived into the tensors of ``runtime``, both of the same packed tensors.

    Args:
        name: of the layer, for errors.

    Raises:
        ConfigError: they are not of the same sizes.
    """
    old, new = derived_tensors(runtime), derived_tensors(fresh)
    sizes = [{key: (t.dtype, t.shape) for key, t in tensors.items()} for tensors in (old, new)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{name}: the new experts need other tensors than CUDA graphs hold; restart vLLM")
    for key, tensor in old.items():
        tensor.copy_(new[key])
