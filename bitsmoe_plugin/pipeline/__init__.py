"""A model, text and options in; the packed model out: two passes over the layers, resumable."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitsmoe_plugin.pipeline.quantize import quantize_model

__all__ = ["quantize_model"]


def __getattr__(name: str) -> Any:
    if name == "quantize_model":  # not before: help needs the options of tuning alone
        from bitsmoe_plugin.pipeline.quantize import quantize_model

        return quantize_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
