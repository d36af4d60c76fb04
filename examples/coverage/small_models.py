"""A small random model of any class of transformers: its default config with other sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from model_classes import ModelClass
from recipes import LAYERS, OPTIONAL, OVERRIDES, SIZES, TOKENS, UNBIASED
from transformers import AutoConfig


def small_model(entry: ModelClass, dtype: torch.dtype = torch.float32) -> Any:
    """Random weights and biases, on the CPU.

    Raises:
        Exception: whatever transformers raises for a class that it cannot build.
    """
    torch.manual_seed(0)
    model = getattr(transformers, entry.name)._from_config(small_config(entry), dtype=dtype).eval()
    generator, unbiased = torch.Generator().manual_seed(1), UNBIASED.get(entry.model_type, "/")
    for name, tensor in model.state_dict().items():
        if (
            "bias" in name
            and unbiased not in name
            and tensor.is_floating_point()
            and tensor.unique().numel() == 1
        ):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def small_config(entry: ModelClass) -> Any:
    """The class's config in small sizes, all kinds of layers once."""
    config = AutoConfig.for_model(entry.model_type)
    entries = _shrink(config.to_dict())
    changes = OVERRIDES.get(entry.model_type, {})
    return type(config)(**_merged(entries, changes))


def _merged(entries: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(entries)
    for key, value in changes.items():
        known = found.get(key)
        found[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return found


def _shrink(entries: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults: classes derive more from it."""
    depth = next((entries[key] for key in LAYERS if isinstance(entries.get(key), int)), 0)
    kept = _representatives(entries, depth)
    found: dict[str, Any] = {}
    for key, value in entries.items():
        if key == "per_layer_config":  # follows from others
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            found[key] = _shrink(value)
        elif key in SIZES and (value is not None or key not in OPTIONAL):
            found[key] = SIZES[key]
        elif key in LAYERS:
            found[key] = len(kept) or value
        elif isinstance(value, list) and kept and len(value) == depth:
            found[key] = [value[index] for index in kept]
        elif key in TOKENS and value is not None:
            found[key] = 0 if key == "pad_token_id" else 1
        elif key == "first_k_dense_replace" and value:
            found[key] = 1
    if found.get("qk_rope_head_dim"):
        found.pop("head_dim", None)  # follows from others
    return found


def _representatives(entries: dict[str, Any], depth: int) -> list[int]:
    """Indices of layers, each kind once, two at least."""
    if not depth:
        return []
    lists = [value for value in entries.values() if isinstance(value, list) and len(value) == depth]
    kinds = [tuple(map(str, kind)) for kind in zip(*lists, strict=True)] or [()] * depth
    first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())[:6]
    return first if len(first) > 1 else [first[0], min(first[0] + 1, depth - 1)]
