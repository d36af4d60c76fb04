"""What the quantizer does when ``from_pretrained`` loads a checkpoint in low precision to quantize it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from bitsmoe_plugin.integrations.merged_configs import SourceConfig
from bitsmoe_plugin.models.json_objects import read_object

if TYPE_CHECKING:
    import torch

    from bitsmoe_plugin.checkpoint.carried_tensors import CarriedTensors
    from bitsmoe_plugin.models.low_precision_source import LowPrecisionSource
    from bitsmoe_plugin.models.stored_names import StoredNames


def unknown_method(files: Sequence[str]) -> str | None:
    """``quant_method`` of the config.json beside a model's files, if transformers does not know it: then it
    goes on as if there were none."""
    config = Path(files[0]).parent / "config.json" if files else None
    found = (
        read_object(config).get("quantization_config") if config is not None and config.is_file() else None
    )
    method = found.get("quant_method") if isinstance(found, dict) else None
    return None if method is None or method in AUTO_QUANTIZATION_CONFIG_MAPPING else str(method)[:80]


class LowPrecisionLoading:
    """Attributes:
    options: how the model is to be quantized.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.options: Any = config.options
        self._settings = config.settings
        self._source: LowPrecisionSource | None = None
        self._rules: tuple[list[Any], list[Any]] = [], []

    @classmethod
    def of(cls, config: Any) -> LowPrecisionLoading | None:
        """None: the config is not that of a checkpoint in low precision which is to be quantized."""
        return cls(config) if isinstance(config, SourceConfig) else None

    @property
    def quantizer(self) -> Any:
        """Of transformers, which dequantizes what is stored; None before ``plan``."""
        return self._source and self._source.precision.quantizer

    def plan(self, model: Any, files: list[str], *, saved: bool = True) -> StoredNames:
        """Check the files of a model before they are loaded, and say how its other weights grow.

        Args:
            model: on the meta device, with its experts.
            saved: whether its other weights will be stored, and grow.

        Returns:
            what becomes of the stored tensors.

        Raises:
            QuantizationError: they cannot be read rightly; naming a tensor and the scheme.
        """
        from bitsmoe_plugin.models.low_precision_source import LowPrecisionSource, without_settings

        source = self._source = LowPrecisionSource(model, self._settings, files)
        source.check_finite()
        growth = source.growth() if saved else None
        if growth is not None:
            warnings.warn(growth, stacklevel=2)
        config = model.config
        without_settings(getattr(config, name) for name in config.sub_configs)
        return source.names

    def carried(self, places: Mapping[str, tuple[str, str]], model: Any) -> CarriedTensors:
        """Layers for prediction, which the model does not load; decoded when they are saved."""
        from bitsmoe_plugin.checkpoint.carried_tensors import DecodedTensors

        assert self._source is not None
        return DecodedTensors(places, self._source.precision, model.dtype)

    def conversions(self, rules: list[Any], model: Any) -> list[Any]:
        """The rules that load the checkpoint, of those that load an unquantized one."""
        assert self._source is not None
        self._rules = list(rules), self._source.precision.conversions(rules, model)
        return self._rules[1]

    def new_dtype(self, *args: Any) -> Any:
        """See ``HfQuantizer.get_new_dtype``."""
        return self.quantizer.get_new_dtype(*args)

    def computed_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which the model computes."""
        from bitsmoe_plugin.models.low_precision import computed_dtype

        return computed_dtype(dtype)

    def loaded(self, model: Any) -> None:
        """From now on the model is one that was loaded from an unquantized checkpoint."""
        from bitsmoe_plugin.models.low_precision import plain_rules

        model._weight_conversions = plain_rules(*self._rules)
