"""Sizes that config.json gives a model, compared with what its files hold before it is built."""

from __future__ import annotations

import math
import re
from typing import Any

from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError

_LARGEST = {
    "num_hidden_layers": 2**12,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**18,
    "vocab_size": 2**24,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_routed_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "max_position_embeddings": 2**24,
}
_LATENT = ("moe_latent_size", "moe_hidden_size")
_SPARE = 2**20


def check_model_sizes(values: dict[str, Any], manifest: BitsMoEConfig) -> None:
    """Refuse a config.json whose sizes are absurd or not those of the packed layers.

    Args:
        values: config.json, or the model config as a dict.

    Raises:
        CheckpointError: naming the entry.
    """
    text = values.get("text_config")
    for part in (values, text if isinstance(text, dict) else {}):
        for key, largest in _LARGEST.items():
            value = part.get(key)
            if value is not None and (type(value) is not int or not 0 <= value <= largest):
                raise CheckpointError(
                    f"{key}={str(value)[:80]} in config.json is not a size (a whole number up to {largest})"
                )
        _check_positions(part)
    part = text if isinstance(text, dict) else values
    _check_depth(part.get("num_hidden_layers"), manifest)
    # Experts of some families are of another size than the stream: one of these.
    hidden = [part[key] for key in ("hidden_size", *_LATENT) if type(part.get(key)) is int]
    chosen = part.get("num_experts_per_tok")
    for name, entry in manifest.layers.items():
        found = entry.get("hidden_size") if isinstance(entry, dict) else None
        if hidden and found not in hidden:
            wanted = " or ".join(map(str, hidden))
            raise CheckpointError(
                f"{name}: hidden_size is {found!r} in quantization_config, but {wanted} in config.json; "
                "it was altered"
            )
        experts = entry.get("num_experts") if isinstance(entry, dict) else None
        if chosen is not None and type(experts) is int and not 0 < chosen <= experts:
            raise CheckpointError(
                f"{name}: num_experts_per_tok={chosen} in config.json, of {experts} experts; it was altered"
            )


def _check_positions(part: dict[str, Any]) -> None:
    """Servers make tables of sines and cosines for all positions that rotary embeddings are scaled to."""
    for key in ("rope_parameters", "rope_scaling"):
        whole = part.get(key)
        if isinstance(whole, dict):
            inner = [entry for entry in whole.values() if isinstance(entry, dict)]  # one per kind of layer
            for entry in (whole, *inner):
                _check_scaling(key, {**part, **entry})


def _check_scaling(key: str, values: dict[str, Any]) -> None:
    """``factor`` times the positions that a model was trained with first.

    Args:
        key: of the entry, for errors.
        values: of the entry, and of the model where it lacks them.
    """
    factor = values.get("factor") or 1
    positions = values.get("original_max_position_embeddings") or values.get("max_position_embeddings") or 1
    largest = _LARGEST["max_position_embeddings"]
    sizes = all(type(value) in (int, float) and 0 < value <= largest for value in (factor, positions))
    if not sizes or factor * positions > largest:
        raise CheckpointError(
            f"{key} in config.json asks for {str(positions)[:80]} positions times {str(factor)[:80]}; that "
            f"is no number up to {largest}"
        )


def _check_depth(depth: int | None, manifest: BitsMoEConfig) -> None:
    """Every decoder layer has tensors; where all are recorded, they bound the depth."""
    if depth is None or not manifest.other_tensors:
        return
    known = {layer_number(name) for name in (*manifest.layers, *manifest.other_tensors)} - {-1}
    if depth > len(known):
        raise CheckpointError(
            f"num_hidden_layers={depth} in config.json, but the checkpoint has tensors of {len(known)} layers"
        )


def layer_number(name: str) -> int:
    """Of the decoder layer that a tensor or module stands in, -1 if in none."""
    match = re.search(r"\.(\d{1,9})\.", name)
    return int(match[1]) if match else -1


def check_planned(planned: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> None:
    """Refuse a model whose tensors are of other shapes than those of its files, or that is far larger.

    Args:
        planned: name -> shape of what the model will hold. Some families have other names for it than their
            files; of those only the sum is compared.
        stored: the same of the files, without packed tensors.

    Raises:
        CheckpointError: naming a tensor, or with both sums.
    """
    planned = {name: shape for name, shape in planned.items() if ".bitsmoe_" not in name}
    for name in sorted(planned.keys() & stored.keys()):
        if planned[name] != stored[name]:
            raise CheckpointError(
                f"{name} is {stored[name]} in the checkpoint, but config.json asks for {planned[name]}; "
                "one of them was altered"
            )
    wanted, held = (sum(map(math.prod, shapes.values())) for shapes in (planned, stored))
    if wanted > 2 * held + _SPARE:  # tied embeddings stand in memory twice, new heads are small
        raise CheckpointError(
            f"config.json describes a model of {wanted} values besides its experts, but the files hold "
            f"{held}; config.json was altered, or files are missing"
        )
