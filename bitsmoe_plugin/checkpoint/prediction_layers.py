"""Layers for multi-token prediction in a packed checkpoint: transformers does not load them, so they stay as
they were, experts included, and are no part of the bits that are counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmoe_plugin.checkpoint.model_sizes import layer_number
from bitsmoe_plugin.models.files import read_header
from bitsmoe_plugin.models.layer_names import PREDICTION

_EXPERT = re.compile(r"(^|\.)experts\.")


@dataclass(frozen=True)
class PredictionSize:
    """Attributes:
    total: bytes of all their tensors.
    experts: bytes of their routed experts, unquantized.
    """

    total: int = 0
    experts: int = 0

    def describe(self) -> str:
        """For people; empty if there are none."""
        if not self.total:
            return ""
        of_experts = f", {self.experts:,} of them their unquantized experts" if self.experts else ""
        return f"{self.total:,} bytes of layers for multi-token prediction, as they were{of_experts}"


def prediction_size(files: Iterable[Path], depth: int | None) -> PredictionSize:
    """What such layers take in some safetensors files, from the headers alone.

    Args:
        files: of a packed checkpoint.
        depth: number of decoder layers, None if not known.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    sizes = {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for path in files
        for name, entry in read_header(path).items()
    }
    found = prediction_names(sizes, depth)
    return PredictionSize(
        sum(sizes[name] for name in found), sum(sizes[name] for name in found if _EXPERT.search(name))
    )


def prediction_names(names: Iterable[str], depth: int | None) -> list[str]:
    """Names of the tensors of such layers among those of a packed checkpoint.

    Their names say so, or they stand in the list of decoder layers that has packed experts, beyond the last.
    Layers of other parts (``visual``) have lists of their own.
    """
    names = list(names)
    lists = {_list_of(name) for name in names if ".bitsmoe_" in name}
    return [
        name
        for name in names
        if ".bitsmoe_" not in name
        and (
            PREDICTION.search(name) is not None
            or (depth is not None and _list_of(name) in lists and layer_number(name) >= depth)
        )
    ]


def depth_of(config: dict[str, Any]) -> int | None:
    """Number of decoder layers that config.json gives a model, None if it does not say."""
    text = config.get("text_config")
    depth = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    return depth if type(depth) is int else None


def _list_of(name: str) -> str:
    return re.split(r"\.\d+\.", name, maxsplit=1)[0]
