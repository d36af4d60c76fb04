"""Experts that stay in the safetensors files of a model until their layer is quantized.

Before transformers loads a model, the parameters of its experts are taken out of it, so they are not
loaded with the rest. Afterwards ``StreamedExperts`` puts those of one layer back for as long as it is
needed, read and converted by transformers' own loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from bitsmoe_plugin.codec.layout import original_dtype
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.absent_parameters import stand_for_absent, take_away_absent
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.models.families import MoELayer, find_moe_layers, layer_shape, read_experts
from bitsmoe_plugin.models.files import open_tensors, read_header


def can_stream(files: Sequence[str] | None) -> bool:
    """Whether single tensors can be read from a checkpoint's files (by the test of transformers)."""
    return bool(files) and str(files[0]).endswith(".safetensors")  # type: ignore[index]


class StreamedExperts:
    """Expert weights on disk; an ``ExpertSource``."""

    def __init__(self, model: Any, files: Sequence[str], quantizer: Any = None) -> None:
        """Take the experts' parameters out of a model that has not been loaded yet.

        Args:
            model: on the meta device.
            files: its safetensors files.
            quantizer: of transformers, by which they are dequantized; None: they are not quantized.

        Raises:
            QuantizationError: no MoE layers, or unknown ones.
        """
        self.layers = find_moe_layers(model)
        self.shapes = [layer_shape(layer.module) for layer in self.layers]
        self.dtypes = [original_dtype(layer.module.down_proj.dtype) for layer in self.layers]
        self.files = [Path(file) for file in files]
        self._model = model
        self._quantizer = quantizer
        self._rules: list[Any] = []
        # Layer name -> its parameters, without data.
        self._empty = {
            layer.name: dict(layer.module.named_parameters(recurse=False)) for layer in self.layers
        }
        self._keys: dict[str, dict[str, dict[str, Path]]] = {}
        self._ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(self._ignored or ()), *map(self._pattern, self.layers)}
        for layer in self.layers:
            self._release(layer)
            stand_for_absent(layer.module, self._empty[layer.name])

    def _pattern(self, layer: MoELayer) -> str:
        """Matches the layer's parameters; a checkpoint may leave out the model's prefix."""
        name = layer.name.removeprefix(f"{self._model.base_model_prefix}.")
        return rf"(^|\.){re.escape(name)}\.({'|'.join(map(re.escape, self._empty[layer.name]))})$"

    def model_is_loaded(self) -> None:
        """To be called when everything else is loaded: find the tensors of each layer in the files.

        Raises:
            QuantizationError: a parameter has none, or the model is not whole in memory.
        """
        self._model._keys_to_ignore_on_load_unexpected = self._ignored
        take_away_absent(self._model)
        for name, parameter in self._model.named_parameters():
            if parameter.is_meta or hasattr(parameter, "_local_tensor"):
                raise QuantizationError(
                    f"{name} is offloaded or distributed, and only experts may be during quantization; "
                    "load the model on the CPU alone or with a device_map of GPUs alone, without tp_plan"
                )
        self._rules = list(getattr(self._model, "_weight_conversions", None) or ())
        self._keys = self._find_keys()
        for layer in self.layers:
            if not self._keys[layer.name]:
                raise QuantizationError(f"{layer.name}: its weights are not in {self._names()}")

    def _find_keys(self) -> dict[str, dict[str, dict[str, Path]]]:
        """Layer name -> parameter -> names of the stored tensors that it is made of -> file."""
        owner = {f"{name}.{part}": name for name, parts in self._empty.items() for part in parts}
        known = dict.fromkeys([*self._model.state_dict(), *owner], True)
        prefix = self._model.base_model_prefix
        renamings = [rule for rule in self._conversions() if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._conversions() if isinstance(rule, WeightConverter)]
        found: dict[str, dict[str, dict[str, Path]]] = {name: {} for name in self._empty}
        for path in self.files:
            for key in read_header(path):
                target, _ = rename_source_key(key, renamings, converters, prefix, known)
                if target not in known and key in known:  # as in transformers: better not renamed
                    target, _ = rename_source_key(key, [], [], prefix, known)
                if target in owner:
                    found[owner[target]].setdefault(target, {})[key] = path
        return found

    def _conversions(self) -> list[Any]:
        """The rules, of transformers or the user, that applied to any tensor when the rest was loaded.

        All tensors in the files were looked at then, the experts' too.
        """
        return self._rules

    def _names(self) -> str:
        return ", ".join(path.name for path in self.files[:3]) + (", ..." if len(self.files) > 3 else "")

    @contextmanager
    def loaded(self, layer: MoELayer) -> Iterator[ExpertWeights]:
        """See ``ExpertSource``.

        Raises:
            QuantizationError: weights are missing, of another shape, or cannot be read or converted.
        """
        try:
            self._load(layer)
            yield read_experts(layer.module)
        finally:
            self._release(layer)

    def _release(self, layer: MoELayer) -> None:
        for name in list(dict(layer.module.named_parameters(recurse=False))):
            delattr(layer.module, name)

    def _load(self, layer: MoELayer) -> None:
        empty = self._empty[layer.name]
        for name, parameter in empty.items():
            setattr(layer.module, name, parameter)
        conversions, reasons = self._model._weight_conversions, []
        try:
            # One after the other: while a parameter is put together, its parts are in memory too.
            for keys in self._keys[layer.name].values():
                reasons += self._load_parameter(layer, keys)
        except (OSError, RuntimeError, ValueError) as error:
            raise QuantizationError(f"{layer.name} cannot be read from {self._names()}: {error}") from error
        finally:
            self._model._weight_conversions = conversions
        missing = [name for name in empty if getattr(layer.module, name).is_meta]
        if missing:
            raise QuantizationError(
                f"{layer.name}: {', '.join(missing)} cannot be made from what is in {self._names()}"
                + (f" ({'; '.join(reasons)})" if reasons else "")
            )

    def _load_parameter(self, layer: MoELayer, keys: dict[str, Path]) -> list[str]:
        """Load what some stored tensors are parts of; returns what went wrong."""
        with ExitStack() as stack:
            stack.enter_context(_without_progress_bars())
            files = {path: stack.enter_context(open_tensors(path)) for path in sorted(set(keys.values()))}
            slices = {key: files[path].get_slice(key) for key, path in keys.items()}
            info, _ = convert_and_load_state_dict_in_model(self._model, slices, self._load_config(layer))
        wrong = [f"{name.rpartition('.')[2]}: {a} for {b}" for name, a, b in info.mismatched_keys]
        # Each with a traceback before it, and one line after it that says where.
        failed = [" ".join(text.strip().splitlines()[-2:]) for text in info.conversion_errors.values()]
        return [*failed, *wrong]

    def _load_config(self, layer: MoELayer) -> LoadStateDictConfig:
        dtype = next(iter(self._empty[layer.name].values())).dtype
        return LoadStateDictConfig(
            device_map={"": self._device(layer)},
            dtype=dtype,
            dtype_plan=self._model._get_dtype_plan(dtype),
            weight_mapping=self._conversions(),
            hf_quantizer=self._quantizer,
        )

    def _device(self, layer: MoELayer) -> torch.device:
        """Where the rest of the layer is."""
        decoder_layer: nn.Module = self._model.get_submodule(layer.layer_name)
        # The experts, without data, may stand first.
        return next(tensor.device for tensor in decoder_layer.parameters() if not tensor.is_meta)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers shows one for every load; here there are two per layer, inside our own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
