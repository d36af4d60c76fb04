"""Which of transformers' classes a saved model is loaded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from bitsmoe_plugin.base.error_lines import one_line
from bitsmoe_plugin.errors import CheckpointError, QuantizationError
from bitsmoe_plugin.models.files import INDEX, SINGLE, check_whole, weight_map
from bitsmoe_plugin.models.low_precision import READ, method_of, stored_settings
from bitsmoe_plugin.models.low_precision_source import source_in
from bitsmoe_plugin.models.model_config import load_config
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.source_tensors import check_source, folder_dtypes
from bitsmoe_plugin.models.stored_names import StoredNames

_OWN_LANGUAGE_MODEL = ("llama4",)
"""Model types whose multimodal class of transformers 5.24 fails at the end of its forward pass; the language
model that it holds is whole, and answers to text."""


def auto_class(config: Any) -> Any:
    """The auto class that loads all of a model: a multimodal one too, with its other parts.

    Some families have a causal language model class beside the multimodal one, which leaves the other parts
    out. It is taken if config.json names it, or names none.

    Args:
        config: transformers' config of the model.

    Raises:
        QuantizationError: transformers knows no language model of this type, or config.json names a class
            without a language model's head.
    """
    kind, named = type(config), str((getattr(config, "architectures", None) or [""])[0])
    whole, causal = (_class_name(auto, kind) for auto in (AutoModelForMultimodalLM, AutoModelForCausalLM))
    if whole is None and causal is None:
        raise QuantizationError(
            f"model type {config.model_type!r} is no language model of transformers: it has no class that "
            "AutoModelForCausalLM or AutoModelForMultimodalLM would load"
        )
    if named not in (whole, causal) and _is_other_class(named, kind):
        raise QuantizationError(
            f"config.json names {named}, which has no language model head; give a checkpoint of "
            f"{' or '.join(name for name in (causal, whole) if name)}"
        )
    if whole is not None and (causal is None or named == whole):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def _class_name(auto: Any, kind: type) -> str | None:
    """Name of the class that an auto class loads for a config, None if it knows none."""
    return str(auto._model_mapping[kind].__name__) if kind in auto._model_mapping else None


def _is_other_class(name: str, kind: type) -> bool:
    """Whether transformers has a model class of this name for a config."""
    found = getattr(transformers, name, None) if name else None
    return isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is kind


def text_model(model: Any) -> Any:
    """What is called with text alone: the model, or the language model that it holds.

    Args:
        model: of transformers, with its output layer.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return getattr(model, "language_model", model) if kind in _OWN_LANGUAGE_MODEL else model


def load_model(model: str | Path | ModelSource, **options: Any) -> Any:
    """A saved model by the class that ``auto_class`` chooses; dequantized if it is in low precision.

    Args:
        model: directory or hub name, or both with what else it takes to find it.
        options: more that ``from_pretrained`` takes.

    Raises:
        QuantizationError: there is no quantization_config, of the model or in ``options``, and its files
            need one; or see ``check_weights``.
        CheckpointError, OSError: see ``ModelSource.config`` and ``check_weights``.
    """
    source = ModelSource.of(model)
    config = source.config()  # it refuses what transformers would ask the terminal about
    local = Path(source.name).is_dir()
    # With options for a quantizer, that looks at the files.
    plain = not options.get("quantization_config")
    if local:
        check_weights(Path(source.name))
    if plain and local:
        check_folder(Path(source.name))
    found = {"trust_remote_code": False, **source.hub(), **options}
    settings = stored_settings(config)
    if plain and settings is not None and method_of(settings) in READ:
        config.quantization_config = {**settings, "dequantize": True}
        found["config"] = config
    loaded = auto_class(config).from_pretrained(source.name, **found)
    if plain and not local:  # now they are here
        check_folder(Path(str(cached_file(source.name, CONFIG_NAME, **source.hub()))).parent)
    return loaded


def empty_model(config: Any) -> Any:
    """The model that a config describes, on the meta device: all shapes and dtypes, no weights.

    Raises:
        QuantizationError: see ``auto_class``; or transformers cannot make it.
    """
    kind = auto_class(config)
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:  # of transformers, of any kind: its classes check few of their values
        raise QuantizationError(
            f"config.json of {config.name_or_path or type(config).__name__} describes a model of type "
            f"{config.model_type!r} that transformers cannot make "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def check_weights(folder: Path) -> None:
    """Refuse a directory whose weights are not all there, or not whole, by name.

    Raises:
        QuantizationError: it has no weights.
        CheckpointError: one of its files is missing, damaged or truncated.
    """
    names = {path.name for path in folder.iterdir()}
    if not names & {SINGLE, INDEX, WEIGHTS_NAME, WEIGHTS_INDEX_NAME}:
        raise QuantizationError(f"{folder} has neither {INDEX} nor {SINGLE}")
    shards = {SINGLE} if SINGLE in names else set()
    if not shards and INDEX in names:
        shards = set(weight_map(folder / INDEX).values())
    if shards - names:
        raise CheckpointError(f"{folder} lacks {', '.join(sorted(shards - names))}")
    for shard in sorted(shards):
        check_whole(folder / shard)


def check_loadable(model: ModelSource) -> None:
    """Refuse a model that is needed later, before other work: its config and, of a directory, its files.

    Raises:
        QuantizationError, CheckpointError, OSError: see ``load_model``.
    """
    auto_class(model.config())
    if Path(model.name).is_dir():
        check_weights(Path(model.name))


def check_folder(folder: Path) -> None:
    """Refuse a model whose config.json says nothing of how its files are to be read, though they need it, and
    one in low precision whose files are not what it says.

    Raises:
        QuantizationError: see ``source_tensors.check_source`` and ``LowPrecisionSource``; or no language
            model.
    """
    config = load_config(folder)
    settings = stored_settings(config)
    if settings is not None and method_of(settings) not in READ:
        return
    model = empty_model(config)
    if settings is None:
        check_source(StoredNames(model), folder_dtypes(folder))
        return
    source = source_in(folder, model, settings)
    if source is not None:
        source.check_for_transformers()
        source.check_finite()
