"""A saved model whose experts stay in its files, to be read one layer at a time."""

from __future__ import annotations

from typing import Any

from bitsmoe_plugin.config import StreamedConfig
from bitsmoe_plugin.models.expert_source import ExpertSource
from bitsmoe_plugin.models.model_class import load_model
from bitsmoe_plugin.models.model_source import ModelSource


def load_streamed(model: ModelSource, dtype: Any = "auto", device: Any = "cpu") -> tuple[Any, ExpertSource]:
    """A saved model, without its experts, and where these come from, layer by layer.

    One in low precision is decoded as when it is quantized.

    Raises:
        QuantizationError, CheckpointError, OSError: see ``load_model`` and ``StreamedExperts``.
    """
    options: dict[str, Any] = {"quantization_config": StreamedConfig(), "dtype": dtype}
    if str(device) != "cpu":
        options["device_map"] = {"": device}
    loaded = load_model(model, **options).eval()
    return loaded, vars(loaded).pop("bitsmoe_source")
