"""``from_pretrained`` of an unquantized model without its experts, see ``config.StreamedConfig``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer

from bitsmoe_plugin.config import STREAMED
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.integrations.transformers import BitsMoEQuantizer


class StreamedQuantizer(BitsMoEQuantizer):
    """Hooks that ``from_pretrained`` calls; those that decode low precision are inherited."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        from bitsmoe_plugin.integrations.low_precision_loading import LowPrecisionLoading

        self._low = LowPrecisionLoading.of(quantization_config)
        options: Any = self._low.options if self._low else quantization_config
        HfQuantizer.__init__(self, options, **kwargs)
        self._source = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint that calls itself so; there is nothing else that it needs."""
        if self.pre_quantized and self._low is None:
            raise CheckpointError(
                f"config.json has quant_method {STREAMED!r}, of which there are no checkpoints"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from bitsmoe_plugin.integrations.low_precision_loading import unknown_method
        from bitsmoe_plugin.integrations.quantize_on_load import source_of_files
        from bitsmoe_plugin.models.source_tensors import check_source, stored_dtypes
        from bitsmoe_plugin.models.stored_names import StoredNames

        files = checkpoint_files or []
        if self._low is not None:
            self._low.plan(model, files, saved=False)
        else:
            check_source(StoredNames(model), stored_dtypes(files), method=unknown_method(files))
        self._source = source_of_files(model, files, self._low.quantizer if self._low else None)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from bitsmoe_plugin.integrations.quantize_on_load import loaded_source
        from bitsmoe_plugin.models.absent_parameters import take_away_absent

        take_away_absent(model)
        model.bitsmoe_source = loaded_source(model, self._source)
        if self._low is not None:
            self._low.loaded(model)
            self._low = None

    def is_serializable(self, **kwargs: Any) -> bool:
        return False
