"""The gating of experts by the name of its activation, for runtimes that have no module to ask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.statistics import Gating

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def gating(activation: str) -> Gating:
    """``activation(gate) * up`` by name.

    Raises:
        ConfigError: an activation that is not known here.
    """
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"experts with activation {activation!r} are not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    act = _ACTIVATIONS[activation]
    return lambda gate, up: act(gate) * up
