"""Every model class of the installed transformers whose config has a number of experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
_NUMBER = re.compile(r"(.*_)?(num|n)_.*experts")


@dataclass(frozen=True)
class ModelClass:
    """Attributes:
    model_type: of config.json.
    name: of the class in transformers.
    """

    model_type: str
    name: str

    @property
    def folder(self) -> str:
        """Where its models are kept."""
        return f"{self.model_type}-{self.name}"


def moe_classes() -> list[ModelClass]:
    """In the order of their model types. A class is listed under the type of its own config alone."""
    found = []
    for model_type in sorted(CONFIG_MAPPING_NAMES):
        names = list(dict.fromkeys(_classes(model_type)))
        if names and _counts_experts(model_type):
            found += [ModelClass(model_type, name) for name in names]
    own = {entry.name: entry for entry in found if entry.model_type.endswith("_text")}
    return [entry for entry in found if own.get(entry.name, entry) == entry]


def _classes(model_type: str) -> Iterator[str]:
    for task in _TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(model_type, ())
        yield from (names,) if isinstance(names, str) else names


def _counts_experts(model_type: str) -> bool:
    try:
        entries = AutoConfig.for_model(model_type).to_dict()
    except (ValueError, StrictDataclassError):  # a config that has no defaults
        return False
    return any(_NUMBER.fullmatch(key) for key in _keys(entries))


def _keys(entries: dict[Any, Any]) -> Iterator[str]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _keys(value)
        elif isinstance(key, str) and "shared" not in key:
            yield key
