"""Which of transformers' classes a saved model is loaded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.utils import CONFIG_NAME, cached_file

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.low_precision import READ, method_of, stored_settings
from bitsmoe_plugin.models.low_precision_source import source_in
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.source_tensors import check_source, folder_dtypes
from bitsmoe_plugin.models.stored_names import StoredNames

_LANGUAGE_ONLY = ("llama4",)
"""Model types whose multimodal class of transformers 5.24 fails in its forward pass."""


def auto_class(config: Any) -> Any:
    """The auto class that loads all of a model: a multimodal one too, with its other parts.

    Some families have a causal language model class beside the multimodal one, which leaves the other parts
    out. It is taken if config.json names it, or if no other works.

    Args:
        config: transformers' config of the model.

    Raises:
        QuantizationError: transformers knows no language model of this type.
    """
    causal: Any
    whole: Any
    causal, whole = (auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM))
    kind, named = type(config), getattr(config, "architectures", None) or [""]
    named_whole = kind in causal and named[0] == whole.get(kind, kind).__name__ != causal[kind].__name__
    if kind in whole and (kind not in causal or (named_whole and config.model_type not in _LANGUAGE_ONLY)):
        return AutoModelForMultimodalLM
    if kind not in causal and not hasattr(config, "auto_map"):
        raise QuantizationError(f"model type {config.model_type!r} is no language model of transformers")
    return AutoModelForCausalLM


def load_model(model: str | Path | ModelSource, **options: Any) -> Any:
    """A saved model by the class that ``auto_class`` chooses; dequantized if it is in low precision.

    Args:
        model: directory or hub name, or both with what else it takes to find it.
        options: more that ``from_pretrained`` takes.

    Raises:
        QuantizationError: there is no quantization_config, of the model or in ``options``, and its files
            need one.
        CheckpointError, OSError: see ``ModelSource.config``.
    """
    source = ModelSource.of(model)
    config = source.config()  # it refuses what transformers would ask the terminal about
    local = Path(source.name).is_dir()
    # With options for a quantizer, that looks at the files.
    plain = not options.get("quantization_config")
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


def check_folder(folder: Path) -> None:
    """Refuse a model whose config.json says nothing of how its files are to be read, though they need it, and
    one in low precision whose files are not what it says.

    Raises:
        QuantizationError: see ``source_tensors.check_source`` and ``LowPrecisionSource``; or no language
            model.
    """
    config = AutoConfig.from_pretrained(folder)
    settings = stored_settings(config)
    if settings is not None and method_of(settings) not in READ:
        return
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    if settings is None:
        check_source(StoredNames(model), folder_dtypes(folder))
        return
    source = source_in(folder, model, settings)
    if source is not None:
        source.check_for_transformers()
        source.check_finite()
