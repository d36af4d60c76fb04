"""The tokenizer that is saved with a model, or that is given in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto import tokenization_auto

from bitsmoe_plugin.base.error_lines import working_on
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.processor import SavedProcessor, is_processor, processor_template


class UntrustedCodeError(ConfigError):
    """A tokenizer brings code along, which nobody allowed to run."""


def load_tokenizer(model: str | Path | ModelSource) -> Any:
    """The tokenizer of a saved model.

    For a directory without one, transformers makes up a tokenizer without a vocabulary, which turns every
    text into nothing: a model would be calibrated on the ends of texts alone. For one with code of its own it
    takes another class, if the code may not be run: a model would be calibrated on other tokens.

    Args:
        model: directory or hub name, or both with what else it takes to find it.

    Raises:
        UntrustedCodeError: the tokenizer brings code along, and ``trust_remote_code`` is not set.
        ConfigError: there is a directory, but no tokenizer in it.
        OSError: nothing can be loaded from there.
    """
    source = ModelSource.of(model)
    with working_on(f"tokenizer of {source.name}"):
        if not source.trust_remote_code:
            _refuse_code(source)
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=source.trust_remote_code, **source.hub()
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"no tokenizer was found at {source.name}: what transformers loads there has {len(tokenizer)} "
            "tokens; copy the model's tokenizer files (tokenizer.json, tokenizer_config.json, ...) there"
        )
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = processor_template(source)
    return tokenizer


def _refuse_code(source: ModelSource) -> None:
    """Refuse a tokenizer whose class transformers does not have."""
    found = tokenization_auto.get_tokenizer_config(source.name, **source.hub())
    code = found.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    classes = code if isinstance(code, (list, tuple)) else [code]
    names = {str(name).rpartition(".")[2].removesuffix("Fast") for name in classes if name}
    if not names or any(tokenization_auto.tokenizer_class_from_name(name) for name in names):
        return  # there is no code, or it has become part of transformers
    # Models whose repositories still name code that transformers has replaced.
    replaced = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    if _model_type(source) in replaced:
        return
    raise UntrustedCodeError(
        f"the tokenizer at {source.name} brings code of its own along ({', '.join(sorted(names))}), which is "
        "run only if you say so: --trust-remote-code, or in Python tokenizer= with the tokenizer, loaded "
        "with trust_remote_code"
    )


def _model_type(source: ModelSource) -> str | None:
    try:
        return PreTrainedConfig.get_config_dict(source.name, **source.hub())[0].get("model_type")
    except OSError:  # a tokenizer alone
        return None


def has_tokenizer_files(source: ModelSource) -> bool:
    """Whether a tokenizer could be there; on the hub always."""
    folder = Path(source.name)
    patterns = ("*token*", "vocab*", "*.model", "*.tiktoken")
    return not folder.is_dir() or any(path for pattern in patterns for path in folder.glob(pattern))


def find_tokenizer(model: str | Path | ModelSource) -> Any:
    """The tokenizer of a saved model, or None if there is none that loads.

    Raises:
        UntrustedCodeError: see ``load_tokenizer``.
    """
    try:
        return load_tokenizer(model)
    except UntrustedCodeError:
        raise
    except (OSError, ValueError):
        return None


def given_tokenizer(tokenizer: Any, source: ModelSource | None = None) -> Any:
    """The tokenizer that an option gives.

    Args:
        tokenizer: directory, hub name, tokenizer or processor.
        source: of the model; the tokenizer's name is looked for in the same way.

    Raises:
        ConfigError: it is none of these, or there is no tokenizer of this name.
    """
    if isinstance(tokenizer, SavedProcessor) or is_processor(tokenizer):
        tokenizer = getattr(tokenizer, "tokenizer", None)
    if isinstance(tokenizer, (str, Path)):
        try:
            return load_tokenizer(source.elsewhere(tokenizer) if source else tokenizer)
        except UntrustedCodeError:
            raise
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"tokenizer={str(tokenizer)!r}: none is found there ({reason})") from error
    if not callable(tokenizer):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}; allowed: a directory or hub name, or a tokenizer of "
            "transformers (of the library tokenizers: PreTrainedTokenizerFast(tokenizer_object=...))"
        )
    return tokenizer
