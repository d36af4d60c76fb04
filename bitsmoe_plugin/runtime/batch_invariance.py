"""The demand that a token's output be the same bit by bit whatever other tokens are computed with it.

The kernels for a CPU always are like that, since it costs them nothing. All else is refused: kernels for a
GPU are chosen by the number of tokens, and plain torch multiplies the tokens of an expert at once.
"""

from __future__ import annotations

import os

import torch

from bitsmoe_plugin.errors import ConfigError

BATCH_INVARIANT = "BITSMOE_BATCH_INVARIANT"
"""Environment variable, so that it reaches the workers of a server."""


def is_wanted() -> bool:
    """As the environment says, by default not.

    Raises:
        ConfigError: it is neither 0 nor 1.
    """
    text = os.environ.get(BATCH_INVARIANT, "0")
    if text not in ("", "0", "1"):
        raise ConfigError(f"{BATCH_INVARIANT}={text!r} is neither 0 nor 1; 1 asks for batch invariance")
    return text == "1"


def refuse_device(device: str | torch.device, option: str = BATCH_INVARIANT) -> None:
    """Raises ConfigError unless it is a CPU; ``option``: what asks for batch invariance."""
    kind = torch.device(device).type
    if kind != "cpu":
        raise ConfigError(
            f"{option}: on {kind} kernels of packed experts are chosen by the number of tokens and sum in "
            "another order then; unset it, or compute on a CPU"
        )


def refuse_plain_torch(missing: str) -> None:
    """Raises ConfigError: a CPU without the compiled library."""
    raise ConfigError(
        f"{BATCH_INVARIANT}: packed experts would run in plain torch, which sums in an order that follows "
        f"the number of tokens: {missing}; unset it, or install what is missing"
    )
