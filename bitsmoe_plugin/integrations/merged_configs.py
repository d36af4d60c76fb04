"""``from_pretrained(path, quantization_config=BitsMoEConfig(...))`` of a checkpoint in low precision.

transformers merges the two configs before any quantizer is made, and refuses two of different classes. There
is no seam before that, so its merging is wrapped, and only what it would refuse is answered here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig, StreamedConfig


class SourceConfig(QuantizationConfigMixin):
    """Stands in a model's config while it is loaded to be quantized.

    Attributes:
        options: how it is to be quantized, or that its experts stay in their files.
        settings: ``quantization_config`` of the checkpoint.
    """

    def __init__(self, options: BitsMoEConfig | StreamedConfig, settings: Mapping[str, Any]) -> None:
        self.quant_method = options.quant_method
        self.options = options
        self.settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return dict(self.settings)


def merged(stored: Any, given: Any) -> SourceConfig | None:
    """What becomes of a checkpoint's config and that of ``from_pretrained``; None: that is for transformers.

    Raises:
        ConfigError: ``given`` is a dict for this method with options that are not allowed.
    """
    if isinstance(given, dict) and given.get("quant_method") == QUANT_METHOD:
        given = BitsMoEConfig.checked_copy(given)
    settings = stored if isinstance(stored, Mapping) else stored.to_dict()
    if not isinstance(given, (BitsMoEConfig, StreamedConfig)) or settings.get("quant_method") == QUANT_METHOD:
        return None
    return SourceConfig(given, settings)


def install() -> None:
    """Wrap the merging of configs. Safe to call more than once."""
    present = AutoHfQuantizer.merge_quantization_configs
    if getattr(present, "knows", None) == QUANT_METHOD:
        return

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        ours = merged(quantization_config, quantization_config_from_args)
        return ours or present(quantization_config, quantization_config_from_args)

    merge_quantization_configs.knows = QUANT_METHOD  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)  # type: ignore[method-assign]
