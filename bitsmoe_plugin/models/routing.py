"""How many experts a model's router chooses, from its config."""

from __future__ import annotations

from typing import Any

_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
"""What the families of transformers call it."""


def experts_per_token(config: Any) -> int | None:
    """Routed experts of a token, the fewest where layers differ; None if the config does not say.

    Args:
        config: of a model, of transformers.
    """
    text = config.get_text_config()
    for name in _NAMES:
        value = getattr(text, name, None)
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = [number for number in values if type(number) is int and number > 0]
        if numbers:
            return min(numbers)
    return None
