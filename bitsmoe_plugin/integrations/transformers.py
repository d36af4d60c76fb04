"""BitsMoE as a quantizer of transformers: quantize on load, load packed, save packed.

Registering imports this module, in programs that may never load a packed model; so each hook imports what it
calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.config import QUANT_METHOD, STREAMED, BitsMoEConfig, StreamedConfig
from bitsmoe_plugin.errors import ConfigError

if TYPE_CHECKING:
    from bitsmoe_plugin.calibration.blocks import Blocks
    from bitsmoe_plugin.codec.dense import DenseScheme
    from bitsmoe_plugin.commands.quantize import quantize_to_directory
    from bitsmoe_plugin.integrations.parallel import SplitLayers
    from bitsmoe_plugin.integrations.tune_on_load import PlannedTuning
    from bitsmoe_plugin.models.expert_source import ExpertSource
    from bitsmoe_plugin.models.stored_names import StoredNames

__all__ = ["BitsMoEQuantizer", "quantize_to_directory", "register"]


def __getattr__(name: str) -> Any:
    if name == "quantize_to_directory":  # with all that quantizing needs
        from bitsmoe_plugin.commands.quantize import quantize_to_directory

        return quantize_to_directory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class BitsMoEQuantizer(HfQuantizer):
    """Hooks that ``from_pretrained`` and ``save_pretrained`` call."""

    requires_calibration = False
    quantization_config: BitsMoEConfig

    def __init__(self, quantization_config: BitsMoEConfig, **kwargs: Any) -> None:
        from bitsmoe_plugin.checkpoint.carried_tensors import CarriedTensors
        from bitsmoe_plugin.integrations.low_precision_loading import LowPrecisionLoading

        # With a checkpoint in low precision pre_quantized stays true: transformers' loader asks then in which
        # dtype tensors are wanted.
        self._low = LowPrecisionLoading.of(quantization_config)
        quantization_config = self._low.options if self._low else quantization_config
        # A copy, because the manifest of this model is written into it: one config object given to
        # two models must not end up describing the second in both.
        super().__init__(BitsMoEConfig.checked_copy(quantization_config), **kwargs)
        self._packed = self.pre_quantized and self._low is None
        self._source: ExpertSource | None = None
        self._blocks: Blocks | None = None
        self._tuning: PlannedTuning | None = None
        self._carried = CarriedTensors({})
        self._split: SplitLayers | None = None
        self._device_map: Any = None
        self._dense: dict[str, DenseScheme] = {}
        self._stored: tuple[StoredNames, list[str]] | None = None
        self._layer_names: tuple[str, str | None] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize without calibration text, or offloaded, before any weight is read.

        Called a second time with the device map that "auto" and the like became.
        """
        from bitsmoe_plugin.integrations.offloading import check_for_quantization, check_invariance

        if self._packed:
            check_invariance(kwargs.get("device_map"))
        else:
            check_for_quantization(kwargs.get("device_map"), None)
        if not self._packed and self.quantization_config.dataset is None:
            raise ConfigError(
                "BitsMoEConfig: dataset=None is not allowed when a model is quantized; give calibration "
                "text as a list of strings, a list of token id lists, a datasets.Dataset, or a path to a "
                ".txt or .jsonl file"
            )
        if not self.pre_quantized:
            self._refuse_slow(kwargs.get("device_map"))

    def _refuse_slow(self, device_map: Any) -> None:
        """Refuse to quantize without compiled kernels, where it is known on what device."""
        from bitsmoe_plugin.codec.backends import refuse_slow

        if device_map is None or isinstance(device_map, dict):
            devices = {str(device) for device in (device_map or {"": "cpu"}).values()}
            refuse_slow("cpu" if devices <= {"cpu"} else "cuda", self.quantization_config.allow_slow)

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuse absurd sizes: no other hook sees config.json before a model is built from it."""
        from bitsmoe_plugin.checkpoint.model_sizes import check_model_sizes

        if self._packed:
            check_model_sizes(config.to_dict(), self.quantization_config)
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._device_map = kwargs.get("device_map")
        if self._packed:
            from bitsmoe_plugin.integrations.dense_loading import empty_linears
            from bitsmoe_plugin.integrations.packed_loading import check_files, replace_experts
            from bitsmoe_plugin.models.stored_names import StoredNames

            files, config = checkpoint_files or [], self.quantization_config
            check_files(model, files, config)
            self._dense = empty_linears(model, config, self._device_map)
            # Before experts are taken out: what the model has no name for is found by what it has.
            names = StoredNames(model)
            self._carry(model, names, files)
            self._note_names(model, names, files)
            self._split = replace_experts(model, files, config)
        else:
            self._plan(model, checkpoint_files)

    def _plan(self, model: nn.Module, files: list[str] | None) -> None:
        """Refuse what cannot be quantized before weights are read."""
        from bitsmoe_plugin.integrations.calibration_blocks import calibration_blocks
        from bitsmoe_plugin.integrations.low_precision_loading import unknown_method
        from bitsmoe_plugin.integrations.offloading import check_for_quantization
        from bitsmoe_plugin.integrations.parallel import distributed_config
        from bitsmoe_plugin.integrations.quantize_on_load import planned_source
        from bitsmoe_plugin.integrations.tune_on_load import PlannedTuning
        from bitsmoe_plugin.models.source_tensors import check_source, stored_dtypes
        from bitsmoe_plugin.models.stored_names import StoredNames

        check_for_quantization(self._device_map, distributed_config(model))
        if self._low is not None:
            names = self._low.plan(model, files or [])
        else:
            names = StoredNames(model)
            check_source(names, stored_dtypes(files or []), method=unknown_method(files or []))
        self._carry(model, names, files or [])
        self._stored = names, files or []
        self._note_names(model, names, files or [])
        quantizer = self._low.quantizer if self._low else None
        carried = self._carried.bytes()
        self._source = planned_source(model, files or [], self.quantization_config, quantizer, carried)
        config = self.quantization_config
        self._blocks = calibration_blocks(model, config, files, self._source.shapes)
        self._tuning = PlannedTuning.of(model, files, self._blocks, config, self._device_map)

    def _carry(self, model: Any, names: StoredNames, files: list[str]) -> None:
        """Keep what the model does not load and others do, to save it with the model."""
        from bitsmoe_plugin.checkpoint.carried_tensors import CarriedTensors
        from bitsmoe_plugin.models.stored_names import without_module

        places = without_module(names, files)[0]
        self._carried = self._low.carried(places, model) if self._low else CarriedTensors(places)

    @known_state()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from bitsmoe_plugin.checkpoint.manifest import TAGS
        from bitsmoe_plugin.integrations.data_parallel import leave_to_each_process
        from bitsmoe_plugin.integrations.dense_loading import fill_linears
        from bitsmoe_plugin.integrations.offloading import verify_layers
        from bitsmoe_plugin.integrations.parameter_count import count_original_parameters, train_others_only
        from bitsmoe_plugin.models.absent_parameters import take_away_absent

        take_away_absent(model)
        model.add_model_tags(list(TAGS))  # of the card that transformers writes on push_to_hub
        count_original_parameters(model)
        train_others_only(model)
        if not self._packed:
            self._quantize(model)
        elif self._split is not None:
            self._split.load(model)
        else:
            verify_layers(model, self.quantization_config, self._device_map)
        fill_linears(model, self._dense)
        self._keep_names(model)
        leave_to_each_process(model)
        if self._tuning is not None:
            self._tuning.run(model)
            self.quantization_config, self._tuning = model.config.quantization_config, None

    def _quantize(self, model: Any) -> None:
        from bitsmoe_plugin.integrations.quantize_on_load import loaded_source, tell_left_out
        from bitsmoe_plugin.integrations.saving import check_save
        from bitsmoe_plugin.pipeline.quantize import quantize_model

        source = loaded_source(model, self._source)
        if self._stored is not None:
            tell_left_out(model, *self._stored)
            self._stored = None
        if self._low is not None:
            self._low.loaded(model)
            self.pre_quantized, self._low = False, None
        self._keep_names(model)
        check_save(model, source.layers, self._carried.empty())
        assert self._blocks is not None
        quantize_model(model, self._blocks, self.quantization_config, source, self._carried.bytes())
        self._source = self._blocks = None  # they hold the model, and the text

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Called before a model is made: it computes in floating point, whatever it is stored in."""
        return dtype if self._low is None else self._low.computed_dtype(dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Called before weights are loaded: those in low precision are decoded."""
        if self._low is None:
            return super().update_weight_conversions(weight_conversions, *args)  # type: ignore[no-any-return]
        return self._low.conversions(weight_conversions, *args)

    def get_new_dtype(self, *args: Any) -> Any:
        """Called for each tensor that is loaded: what is decoded must not be cast before."""
        return self._low.new_dtype(*args) if self._low else super().get_new_dtype(*args)

    def _note_names(self, model: Any, names: StoredNames, files: list[str]) -> None:
        """Look what decoder layers are called in the files, by the rules of the model's class alone."""
        from bitsmoe_plugin.integrations.kept_names import stored_prefix
        from bitsmoe_plugin.models.families import find_moe_layers

        layer = find_moe_layers(model)[0].layer_name
        self._layer_names = layer, stored_prefix(layer, names, files)

    def _keep_names(self, model: Any) -> None:
        """Have the model saved by the names that it was read by."""
        from bitsmoe_plugin.integrations.kept_names import keep_layer_names

        if self._layer_names is not None:
            keep_layer_names(model, *self._layer_names)
            self._layer_names = None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called before config and weights are saved: record what will be in the files."""
        from bitsmoe_plugin.integrations.current_manifest import describe_current
        from bitsmoe_plugin.integrations.dense_loading import with_packed_linears
        from bitsmoe_plugin.integrations.saving import carry, records
        from bitsmoe_plugin.integrations.spread_state import check_saving, whole_state
        from bitsmoe_plugin.runtime.dense_linear import dense_manifest

        if getattr(model, "_hf_peft_config_loaded", False):  # adapters are saved, of which we record nothing
            return model.state_dict(), {}
        check_saving(model)
        config = model.config.quantization_config
        describe_current(model, config)
        state = whole_state(model, self._split) | carry(model, self._carried.read())
        state, config.dense = with_packed_linears(model, state), dense_manifest(model)
        config.validate()
        config.other_tensors, config.other_tensors_in_model = records(model, state)
        return state, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from bitsmoe_plugin.integrations.dequantize import dequantize_model

        # The config of a model that was saved holds a name.
        dequantize_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        super().remove_quantization_config(model)
        # Or the model would be saved by the names that its packed files needed, and called quantized.
        vars(model).pop("_weight_conversions", None)
        model.config._is_quantized = False

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # everything but the experts is, and gradients pass through these

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know ``quant_method: bitsmoe``. Safe to call more than once."""
    from bitsmoe_plugin.integrations.merged_configs import install

    install()
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD)
    if getattr(known, "stands_in_for", None) == QUANT_METHOD:  # of vllm_ext.autoload
        del AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitsMoEConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(BitsMoEQuantizer)
    if STREAMED not in AUTO_QUANTIZER_MAPPING:
        from bitsmoe_plugin.integrations.streamed_loading import StreamedQuantizer

        register_quantization_config(STREAMED)(StreamedConfig)
        register_quantizer(STREAMED)(StreamedQuantizer)
