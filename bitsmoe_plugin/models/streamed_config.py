"""Asks ``from_pretrained`` for a model whose experts stay in its files; see ``streamed_model``."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

STREAMED = "bitsmoe-streamed"


class StreamedConfig(QuantizationConfigMixin):
    """``quantization_config`` of such a call; nothing is quantized."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = STREAMED  # type: ignore[assignment]
