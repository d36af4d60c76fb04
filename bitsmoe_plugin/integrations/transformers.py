"""BitsMoE as a quantizer of transformers: quantize on load, load packed, save packed."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from bitsmoe_plugin.allocation.super_expert_policy import model_budget
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.checkpoint.carried_tensors import CarriedTensors
from bitsmoe_plugin.checkpoint.headers import stored_tensors, verify_headers
from bitsmoe_plugin.checkpoint.manifest import TAGS, check_shape, packed_spec
from bitsmoe_plugin.checkpoint.model_sizes import check_model_sizes, check_planned
from bitsmoe_plugin.checkpoint.other_tensors import stored_shapes, verify_others
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.commands.quantize import quantize_to_directory
from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.integrations.calibration_blocks import calibration_blocks
from bitsmoe_plugin.integrations.current_manifest import describe_current
from bitsmoe_plugin.integrations.data_parallel import leave_to_each_process
from bitsmoe_plugin.integrations.dequantize import dequantize_model
from bitsmoe_plugin.integrations.offloading import check_for_quantization, verify_layers
from bitsmoe_plugin.integrations.parallel import (
    SplitLayers,
    distributed_config,
    empty_split_layers,
)
from bitsmoe_plugin.integrations.parameter_count import count_original_parameters, train_others_only
from bitsmoe_plugin.integrations.saving import carry, check_save, records
from bitsmoe_plugin.integrations.spread_state import check_saving, whole_state
from bitsmoe_plugin.models.expert_source import ExpertSource, LoadedExperts
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.models.files import check_loaded_files
from bitsmoe_plugin.models.layer_names import decoder_layer
from bitsmoe_plugin.models.source_tensors import check_source, stored_dtypes
from bitsmoe_plugin.models.stored_names import StoredNames, describe_left_out, without_module
from bitsmoe_plugin.models.streamed_experts import StreamedExperts, can_stream
from bitsmoe_plugin.pipeline.quantize import quantize_model
from bitsmoe_plugin.runtime.experts import BitsMoEExperts, replace_module

__all__ = ["BitsMoEQuantizer", "quantize_to_directory", "register"]


class BitsMoEQuantizer(HfQuantizer):
    """Hooks that ``from_pretrained`` and ``save_pretrained`` call."""

    requires_calibration = False
    quantization_config: BitsMoEConfig

    def __init__(self, quantization_config: BitsMoEConfig, **kwargs: Any) -> None:
        # A copy, because the manifest of this model is written into it: one config object given to
        # two models must not end up describing the second in both.
        super().__init__(BitsMoEConfig.checked_copy(quantization_config), **kwargs)
        self._source: ExpertSource | None = None
        self._blocks: Tensor | None = None
        self._carried = CarriedTensors({})
        self._split: SplitLayers | None = None
        self._device_map: Any = None
        self._stored: tuple[StoredNames, list[str]] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize without calibration text, or offloaded, before any weight is read.

        Called a second time with the device map that "auto" and the like became.
        """
        if not self.pre_quantized:
            check_for_quantization(kwargs.get("device_map"), None)
        if not self.pre_quantized and self.quantization_config.dataset is None:
            raise ConfigError(
                "BitsMoEConfig: dataset=None is not allowed when a model is quantized; give calibration "
                "text as a list of strings, a list of token id lists, a datasets.Dataset, or a path to a "
                ".txt or .jsonl file"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuse absurd sizes: no other hook sees config.json before a model is built from it."""
        if self.pre_quantized:
            check_model_sizes(config.to_dict(), self.quantization_config)
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config, self._device_map = self.quantization_config, kwargs.get("device_map")
        files = checkpoint_files or []
        if not self.pre_quantized:
            check_for_quantization(self._device_map, distributed_config(model))
        if self.pre_quantized and files:
            check_loaded_files(files, Path(getattr(model.config, "_name_or_path", "")))
            tied = getattr(model, "all_tied_weights_keys", {})
            verify_others(files, config.other_tensors, config.other_tensors_in_model, tied)
        # Before experts are taken out: what the model has no name for is found by what it has.
        names = StoredNames(model)
        if not self.pre_quantized:
            check_source(names, stored_dtypes(files))
        predicting, _ = without_module(names, files)
        self._carried = CarriedTensors(predicting)
        if not self.pre_quantized:
            self._stored = names, files
            self._source = _expert_source(model, files)
            model_budget(self._source, config)
            # Before weights are read: what is wrong with the text should show now.
            self._blocks = calibration_blocks(model, config, checkpoint_files)
            return
        self._replace_experts(model, files)
        if files:
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            check_planned(shapes, stored_shapes(files))

    def _replace_experts(self, model: nn.Module, files: list[str]) -> None:
        """Put empty packed experts where the originals are, once manifest and files are seen to fit."""
        config, spread = self.quantization_config, distributed_config(model)
        layers = find_moe_layers(model)
        stored = stored_names([layer.name for layer in layers], config)
        surplus = set(config.layers) - set(stored.values())
        if surplus:
            raise CheckpointError(
                f"quantization_config describes {', '.join(sorted(surplus))}, which the model lacks"
            )
        manifest = copy.copy(config)
        config.layers = {name: config.layers[old] for name, old in stored.items()}
        specs = {layer.name: packed_spec(layer.name, config) for layer in layers}
        tensors = stored_tensors(files)
        if files:
            verify_headers(tensors, {stored[name]: spec for name, spec in specs.items()})
        for layer in layers:
            check_shape(layer.name, specs[layer.name], layer.module)
            module = BitsMoEExperts(layer.module, specs[layer.name])
            module.drop_original_weights()
            replace_module(model, layer.name, module)
        if spread is not None:
            packed_files = PackedFiles(
                manifest, {stored[name]: spec for name, spec in specs.items()}, tensors
            )
            self._split = empty_split_layers(model, spread, packed_files, stored)

    @known_state()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.add_model_tags(list(TAGS))  # of the card that transformers writes on push_to_hub
        count_original_parameters(model)
        train_others_only(model)
        if not self.pre_quantized:
            self._quantize(model)
        elif self._split is not None:
            self._split.load(model)
        else:
            verify_layers(model, self.quantization_config, self._device_map)
        leave_to_each_process(model)

    def _quantize(self, model: Any) -> None:
        config, source = self.quantization_config, self._source or LoadedExperts(model)
        if isinstance(source, StreamedExperts):
            source.model_is_loaded()
        self._tell_left_out(model)
        check_save(model, source.layers, self._carried.empty())
        assert self._blocks is not None
        quantize_model(model, self._blocks, config, source)
        self._source = self._blocks = None  # they hold the model, and the text

    def _tell_left_out(self, model: Any) -> None:
        """Once all rules are known that names were read by."""
        if self._stored is not None:
            names, files = self._stored
            names.use_rules_of(model)
            _, left_out = without_module(names, files)
            if left_out:
                warnings.warn(describe_left_out(type(model).__name__, left_out), stacklevel=2)
            self._stored = None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called before config and weights are saved: record what will be in the files."""
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters are saved, of which we record nothing
            return model.state_dict(), {}
        check_saving(model)
        config = model.config.quantization_config
        describe_current(model, config)
        state = whole_state(model, self._split) | carry(model, self._carried.read())
        config.validate()
        config.other_tensors, config.other_tensors_in_model = records(model, state)
        return state, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
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


def stored_names(layers: list[str], config: BitsMoEConfig) -> dict[str, str]:
    """Name of each layer in the model -> its name in the manifest, for those that are there.

    They differ by what stands before the decoder layers where another class loads what was saved.
    """
    by_layer = {decoder_layer(name): name for name in config.layers}
    return {layer: by_layer[decoder_layer(layer)] for layer in layers if decoder_layer(layer) in by_layer}


def _expert_source(model: nn.Module, files: list[str] | None) -> ExpertSource:
    """Where the experts' weights will come from, for a model that is not loaded yet."""
    if files and can_stream(files):
        return StreamedExperts(model, files)
    warnings.warn(
        "the model is not loaded from safetensors files, so all of it is in memory while it is quantized",
        stacklevel=2,
    )
    return LoadedExperts(model)


def register() -> None:
    """Make transformers know ``quant_method: bitsmoe``. Safe to call more than once."""
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD)
    if getattr(known, "stands_in_for", None) == QUANT_METHOD:  # of vllm_ext.autoload
        del AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitsMoEConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(BitsMoEQuantizer)
