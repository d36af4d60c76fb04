"""BitsMoE as a quantizer of transformers: quantize on load, load packed, save packed."""

from __future__ import annotations

import copy
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from bitsmoe_plugin.checkpoint import check_shape, packed_spec, stored_tensors, verify_experts, verify_headers
from bitsmoe_plugin.checkpoint_files import check_loaded_files
from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError, ConfigError, QuantizationError
from bitsmoe_plugin.experts import BitsMoEExperts, replace_module
from bitsmoe_plugin.families import find_moe_layers
from bitsmoe_plugin.integrations.calibration_blocks import calibration_blocks
from bitsmoe_plugin.integrations.streaming import StreamedExperts, can_stream
from bitsmoe_plugin.interruption import Interrupted
from bitsmoe_plugin.kept import model_budget
from bitsmoe_plugin.model_card import TAGS, write_model_card
from bitsmoe_plugin.model_sizes import check_model_sizes, check_planned
from bitsmoe_plugin.model_source import ModelSource
from bitsmoe_plugin.model_tokenizer import find_tokenizer, given_tokenizer
from bitsmoe_plugin.other_tensors import prediction_layers, record, stored_shapes, verify_others
from bitsmoe_plugin.output_directory import check_output_directory, publish
from bitsmoe_plugin.pipeline import quantize_model
from bitsmoe_plugin.sources import ExpertSource, LoadedExperts
from bitsmoe_plugin.work_directory import OUTPUT, has_progress, locked, remove, staging, writing
from bitsmoe_plugin.workers import Workers


def _read(path: str, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


class BitsMoEQuantizer(HfQuantizer):
    """Hooks that ``from_pretrained`` and ``save_pretrained`` call."""

    requires_calibration = False
    quantization_config: BitsMoEConfig

    def __init__(self, quantization_config: BitsMoEConfig, **kwargs: Any) -> None:
        # A copy, because the manifest of this model is written into it: one config object given to
        # two models must not end up describing the second in both.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self._source: ExpertSource | None = None
        self._blocks: Tensor | None = None
        self._prediction_layers: dict[str, str] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize without calibration text before any weight is read."""
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
        config = self.quantization_config
        if self.pre_quantized and checkpoint_files:
            check_loaded_files(checkpoint_files, Path(getattr(model.config, "_name_or_path", "")))
            verify_others(checkpoint_files, config.other_tensors)
        # Before experts are taken out: what the model has no name for is found by what it has.
        self._prediction_layers = prediction_layers(model, checkpoint_files or [])
        if not self.pre_quantized:
            self._source = _expert_source(model, checkpoint_files)
            model_budget(self._source, config)
            # Before weights are read: what is wrong with the text should show now.
            self._blocks = calibration_blocks(model, config, checkpoint_files)
            return
        self._replace_experts(model, checkpoint_files or [])
        if checkpoint_files:
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            check_planned(shapes, stored_shapes(checkpoint_files))

    def _replace_experts(self, model: nn.Module, files: list[str]) -> None:
        """Put empty packed experts where the originals are, once manifest and files are seen to fit."""
        config = self.quantization_config
        layers = find_moe_layers(model)
        stored = _stored_names(model, [layer.name for layer in layers], config)
        surplus = set(config.layers) - set(stored.values())
        if surplus:
            raise CheckpointError(
                f"quantization_config describes {', '.join(sorted(surplus))}, which the model lacks"
            )
        config.layers = {name: config.layers[old] for name, old in stored.items()}
        specs = {layer.name: packed_spec(layer.name, config) for layer in layers}
        if files:
            verify_headers(stored_tensors(files), {stored[name]: spec for name, spec in specs.items()})
        for layer in layers:
            check_shape(layer.name, specs[layer.name], layer.module)
            module = BitsMoEExperts(layer.module, specs[layer.name])
            module.drop_original_weights()
            replace_module(model, layer.name, module)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.add_model_tags(list(TAGS))  # of the card that transformers writes on push_to_hub
        if self.pre_quantized:
            for name, module in model.named_modules():
                if isinstance(module, BitsMoEExperts):
                    verify_experts(name, module, self.quantization_config)
            return
        config, source = self.quantization_config, self._source
        if isinstance(source, StreamedExperts):
            source.model_is_loaded()
        assert self._blocks is not None
        quantize_model(model, self._blocks, config, source)
        self._source = self._blocks = None  # they hold the model, and the text

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called before config and weights are saved: record what else will be in the files."""
        extra = {name: _read(path, name) for name, path in self._prediction_layers.items()}
        state = {**model.state_dict(), **extra}
        ignored = model._keys_to_ignore_on_save or ()
        kept = {name: tensor for name, tensor in state.items() if name not in ignored}
        saved = revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))
        if not extra.keys() <= saved.keys():
            raise CheckpointError(
                f"{', '.join(sorted(extra.keys() - saved.keys()))} would be renamed on saving; transformers "
                "has no name for it. Remove it from the model's files first, if it is not needed"
            )
        model.config.quantization_config.other_tensors = record(saved)
        return state, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _stored_names(model: Any, layers: list[str], config: BitsMoEConfig) -> dict[str, str]:
    """Name of each layer in the model -> its name in the manifest, for those that are there.

    They differ by the prefix of the base model where ``AutoModel`` loads what was saved with a head, or the
    other way round.
    """
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for layer in layers:
        for name in (layer, prefix + layer, layer.removeprefix(prefix)):
            if name in config.layers:
                found.setdefault(layer, name)
    return found


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


def quantize_to_directory(
    model: str | ModelSource, out: Path, config: BitsMoEConfig, device: str = "cpu"
) -> None:
    """Quantize a saved model and write it packed, with its tokenizer and a model card.

    Finished layers are kept in a work directory (``config.work_dir``, or ``out`` with ".work" appended)
    until all is done: the same call continues there if this one ends early. ``out`` takes its name at the
    end, so it is either absent or complete. Of several processes (see ``workers``) the first one writes.

    Args:
        model: directory or hub name, or both with what else it takes to find it and its tokenizer.
        device: what the model is loaded to, and quantized on; see ``devices.choose_device``.

    Raises:
        BitsMoEError: bad input. Nothing is left behind but layers that were finished.
        Interrupted: Ctrl-C; says how to go on.
    """
    out, workers, origin = Path(out).resolve(), Workers.present(), ModelSource.of(model)
    workers.from_main(lambda: check_output_directory(out))
    workers.from_main(lambda: _check_unquantized(origin))
    if device != "cpu" and find_spec("accelerate") is None:
        raise ConfigError(f"to load to {device}, transformers needs accelerate; pip install accelerate")
    config = copy.copy(config)
    tokenizer = find_tokenizer(origin)  # first of all: it may be refused
    if config.tokenizer is not None:
        config.tokenizer = given_tokenizer(config.tokenizer, origin)
    else:
        config.tokenizer = copy.deepcopy(tokenizer)  # encoding leaves traces, which should not be saved
    options = {"quantization_config": config, "trust_remote_code": False, **origin.hub()}
    if device != "cpu":
        options["device_map"] = {"": device}
    # Beside ``out``, so that a rename within one file system publishes it, wherever the layers are kept.
    beside = out.with_name(f"{out.name}.work")
    config.work_dir = work = Path(config.work_dir or beside)
    if not workers.main:  # it takes part, the first process writes
        AutoModelForCausalLM.from_pretrained(origin.name, **options)
        return
    with locked(work), staging(beside):
        try:
            quantized = AutoModelForCausalLM.from_pretrained(origin.name, **options)
            with writing(out):
                write_checkpoint(quantized, tokenizer, origin.name, config.dataset, beside / OUTPUT, out)
        except BaseException as error:
            if not has_progress(work):
                remove(work)
                if isinstance(error, Interrupted):  # which says that there is something to go on with
                    raise KeyboardInterrupt from error
            elif isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
                raise Interrupted(
                    f"stopped; {work} holds the layers that are finished. Start the same again to go on"
                ) from error
            raise
        remove(work)


def _check_unquantized(origin: ModelSource) -> None:
    """Refuse what transformers would load as it is, with no more than a warning, to be saved once more."""
    found = getattr(origin.config(), "quantization_config", None) or {}
    if found:
        raise QuantizationError(
            f"{origin.name} is quantized already (quant_method {str(found.get('quant_method'))[:80]!r}); an "
            "unquantized model is needed"
        )


def write_checkpoint(
    quantized: Any, tokenizer: Any, model: str, dataset: Any, partial: Path, out: Path
) -> None:
    """Save at ``partial``, which then becomes ``out``.

    Args:
        tokenizer: of what was quantized; None: it has none, and there is a warning.
        model: directory or hub name of what was quantized.
        dataset: what it was calibrated on.
    """
    if partial.exists():  # of a run that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    quantized.save_pretrained(partial)
    if tokenizer is None:
        warnings.warn(f"no tokenizer saved: none found at {model}", stacklevel=3)
    else:
        tokenizer.save_pretrained(partial)
    write_model_card(partial, model, dataset)
    publish(partial, out)
