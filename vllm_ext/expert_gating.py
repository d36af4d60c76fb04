"""What vLLM's layer computes between the projections of an expert, as the gating that runtimes know."""

from __future__ import annotations

import math
from typing import Any

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.gating import GatingForm

_NO_GATE = "_no_mul"
_PLAIN = ("silu", "gelu", "gelu_tanh", "relu2")
_GPT_OSS = GatingForm(activation="silu", alpha=1.702, limit=7.0, offset=1.0)
"""vLLM's operator has these constants."""
_STEP = GatingForm(activation="silu", limit=7.0, clamps_activation=True)


def gating_of(name: str, layer: Any, expected: GatingForm | None) -> GatingForm:
    """The gating that vLLM asks of a layer's experts.

    Args:
        name: of the layer, for errors.
        layer: vLLM's experts.
        expected: what the experts compute in transformers.

    Raises:
        ConfigError: another one, or one that runtimes do not know.
    """
    found = _form(name, layer)
    if found != expected:
        raise ConfigError(
            f"{name}: between the projections of its experts vLLM computes {found.text()}, transformers "
            f"{expected.text() if expected else 'something that has no name'}; "
            "run this model with transformers"
        )
    return found


def _form(name: str, layer: Any) -> GatingForm:
    activation = layer.activation.value
    limit, alpha, beta = (getattr(layer, f"swiglu_{option}", None) for option in ("limit", "alpha", "beta"))
    if activation == "swigluoai":
        return _GPT_OSS
    if activation == "swiglustep":
        return _STEP
    if activation == "swigluoai_uninterleave" and limit is not None:
        return GatingForm(activation="silu", alpha=alpha or 1.0, limit=limit, offset=beta or 0.0)
    plain = activation.removesuffix(_NO_GATE)
    if plain not in _PLAIN or (limit is not None and activation != "silu"):
        raise ConfigError(f"{name}: bitsmoe cannot serve experts with vLLM's gating {activation!r}")
    return GatingForm(
        activation=plain, has_gate=plain == activation, limit=math.inf if limit is None else limit
    )
