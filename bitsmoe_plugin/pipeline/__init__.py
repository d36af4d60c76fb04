"""A model, text and options in; the packed model out: two passes over the layers, resumable."""

from bitsmoe_plugin.pipeline.quantize import quantize_model

__all__ = ["quantize_model"]
