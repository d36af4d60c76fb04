"""The processor that is saved with a multimodal model, which makes its inputs of text and images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, PROCESSOR_NAME, cached_file

from bitsmoe_plugin.base.error_lines import one_line
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.json_objects import read_object
from bitsmoe_plugin.models.model_source import ModelSource


@dataclass(frozen=True)
class SavedProcessor:
    """A tokenizer, and where the processor lies that belongs to it, which few datasets need.

    Attributes:
        tokenizer: of transformers.
        source: of the processor.
    """

    tokenizer: Any
    source: ModelSource

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of the tokenizer."""
        return self.tokenizer(*args, **kwargs)

    def load(self) -> Any:
        """See ``load_processor``."""
        return load_processor(self.source)


def is_processor(given: Any) -> bool:
    """Whether something makes model inputs of images too: a processor of transformers, or one like it."""
    return isinstance(given, ProcessorMixin) or all(
        hasattr(given, name) for name in ("tokenizer", "apply_chat_template")
    )


def processor_template(source: ModelSource) -> str | None:
    """The chat template of a processor that keeps it in a file of its own, which tokenizers do not read.

    Raises:
        CheckpointError: the file is damaged.
    """
    for name in (LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, PROCESSOR_NAME):
        path = cached_file(source.name, name, _raise_exceptions_for_missing_entries=False, **source.hub())
        template = read_object(Path(path)).get("chat_template") if path else None
        if isinstance(template, str):
            return template
    return None


def load_processor(source: ModelSource) -> Any:
    """The processor of a saved model.

    Raises:
        ConfigError: none is there, or it cannot be loaded; with the reason, such as a package that it needs.
    """
    cure = "give the processor itself (in Python, tokenizer=), or a dataset without images"
    try:
        found = AutoProcessor.from_pretrained(
            source.name, trust_remote_code=source.trust_remote_code, **source.hub()
        )
    except Exception as error:  # processors raise what they like, packages that are missing among it
        raise ConfigError(
            f"the dataset holds images, but the processor at {source.name} cannot be loaded "
            f"({type(error).__name__}: {one_line(error)}); install what it names, or {cure}"
        ) from error
    if not is_processor(found):
        raise ConfigError(
            f"the dataset holds images, but {source.name} has no processor (processor_config.json, "
            f"preprocessor_config.json); copy the model's there, or {cure}"
        )
    return found
