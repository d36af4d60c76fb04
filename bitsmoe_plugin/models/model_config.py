"""What config.json says a model is, by transformers: its config, and the model without weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers import __version__ as version

from bitsmoe_plugin.base.error_lines import one_line
from bitsmoe_plugin.errors import QuantizationError


def load_config(name: str | Path, **options: Any) -> Any:
    """transformers' config of a model.

    Args:
        name: directory, or name on the hub.
        options: what else ``from_pretrained`` takes to find it.

    Raises:
        QuantizationError: config.json names a model type that transformers does not know, or holds a value
            that it refuses.
        OSError: nothing is found.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise QuantizationError(f"{Path(name) / 'config.json'} cannot be used: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    unknown = re.search(r"has model type `([^`]*)` but Transformers does not recognize", str(error))
    if unknown:
        return f"transformers {version} knows no model type {unknown[1]!r}; a newer release may"
    if str(error).startswith("Unrecognized model in"):  # and a list of all types
        return "it names no model_type"
    return one_line(error)
