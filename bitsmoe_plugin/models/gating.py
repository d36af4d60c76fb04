"""The gating of experts by the name of its activation, for runtimes that have no module to ask, and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bitsmoe_plugin.errors import ConfigError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}

Gating = Callable[[Tensor, Tensor], Tensor]
"""(gate ``[n, I]``, up ``[n, I]``) -> hidden ``[n, I]``, elementwise."""


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


def probe() -> tuple[Tensor, Tensor]:
    """Gate and up ``[n, n]`` float32 on the CPU on which gatings are told apart.

    Far out, too: some families clamp at 7 or 10.
    """
    near = torch.linspace(-6, 6, 49, dtype=torch.float32, device="cpu")
    far = torch.tensor([7.5, 9.0, 12.0, 24.0, 100.0, 1000.0], dtype=torch.float32, device="cpu")
    values = torch.cat([-far, near, far])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    return gate, up


def activation_of(function: Gating) -> str | None:
    """The name whose gating ``function`` computes, None if it is none of those known.

    Found by trying: modules name and wrap their activations in many ways.
    """
    gate, up = probe()
    result = function(gate, up)
    for name in _ACTIVATIONS:
        if torch.allclose(result, gating(name)(gate, up), rtol=1e-5, atol=1e-6):
            return name
    return None
