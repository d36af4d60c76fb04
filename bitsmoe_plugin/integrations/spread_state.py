"""What a packed model is saved with, also where part of it is on disk or in another process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.integrations.accelerate import load_offloaded_parameter

from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.integrations.parallel import SplitLayers, distributed_config

PACKED = ".bitsmoe_"


def check_saving(model: Any) -> None:
    """Refuse to save a model of which transformers would save a part, or more than it loads.

    Raises:
        ConfigError: naming what spreads it.
    """
    config = distributed_config(model)
    for name in ("pp_size", "fsdp_size", "dp_replicate_size"):
        if getattr(config, name, 1) > 1:
            raise ConfigError(
                f"save_pretrained: with {name}={getattr(config, name)}, parts of a packed model would be "
                "missing or twice in its files; load it in one process, or with tp_size, and save it there"
            )


def whole_state(model: Any, split: SplitLayers | None) -> dict[str, Tensor]:
    """The model's state, of all processes together. All of them must call this.

    Tensors that are offloaded stay on the meta device: transformers loads them while it writes files.

    Args:
        split: the layers of which this process holds a part; read from the files that they came from.
    """
    state = _gathered(model.state_dict())
    if split is None:
        return state
    return {name: t for name, t in state.items() if PACKED not in name} | dict(split.whole_tensors(model))


def _gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With tensors of several processes put together; those that are one in memory stay one."""
    whole: dict[int, Tensor] = {}

    def gather(tensor: Any) -> Tensor:
        place = tensor.to_local().data_ptr()
        if place not in whole:
            whole[place] = tensor.full_tensor().cpu()
        return whole[place]

    return {
        name: gather(tensor) if hasattr(tensor, "full_tensor") else tensor for name, tensor in state.items()
    }


def in_parts(model: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What is not packed: at once, or of an offloaded model layer by layer, so that the rest stays there."""
    others = {name: tensor for name, tensor in state.items() if PACKED not in name}
    if not any(tensor.is_meta for tensor in state.values()):
        yield others
        return
    layers: dict[str, list[str]] = {}
    for name in others:
        layer = re.match(r".*?\.\d+\.", name)
        layers.setdefault(layer[0] if layer else "", []).append(name)
    for names in layers.values():
        yield {name: value_of(model, name, others[name]) for name in names}


def value_of(model: Any, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a model's state, read from where it is offloaded to.

    Raises:
        CheckpointError: it has no value anywhere.
    """
    if not tensor.is_meta:
        return tensor
    try:
        return load_offloaded_parameter(model, name)  # type: ignore[no-any-return]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{name} is on the meta device and offloaded to nowhere, so it has no values; load the model to "
            "a device that has memory"
        ) from error
