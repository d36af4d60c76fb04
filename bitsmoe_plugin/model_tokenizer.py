"""The tokenizer that is saved with a model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from bitsmoe_plugin.error_lines import working_on
from bitsmoe_plugin.errors import ConfigError


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a saved model.

    For a directory without one, transformers makes up a tokenizer without a vocabulary, which turns every
    text into nothing: a model would be calibrated on the ends of texts alone.

    Args:
        model: directory or hub name.

    Raises:
        ConfigError: there is a directory, but no tokenizer in it.
        OSError: nothing can be loaded from there.
    """
    with working_on(f"tokenizer of {model}"):
        tokenizer = AutoTokenizer.from_pretrained(model)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"no tokenizer was found at {model}: what transformers loads there has {len(tokenizer)} tokens; "
            "copy the model's tokenizer files (tokenizer.json, tokenizer_config.json, ...) there"
        )
    return tokenizer
