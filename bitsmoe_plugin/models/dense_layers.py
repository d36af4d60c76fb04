"""Linear layers of a model outside its routed experts, and in how many bits each is to be stored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from bitsmoe_plugin.codec.dense import GROUP_SIZES, PACKED, UNIT, DenseScheme, dense_key
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.models.families import MoELayer

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Parts of the names of what decides where tokens go; that stays as it is."""
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Layers that vLLM computes as one, so they need one scheme."""


def linear_layers(model: nn.Module, layers: Sequence[MoELayer]) -> dict[str, nn.Linear]:
    """Linear layers by name: of the decoder layers, but experts and routers; and the head, if there is one.

    Args:
        layers: with experts.
    """
    experts = tuple(f"{layer.name}." for layer in layers)
    decoder = layers[0].layer_name.rpartition(".")[0] + "."
    head = head_name(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (name == head or name.startswith(decoder))
        and not name.startswith(experts)
        and not any(part in _ROUTERS for part in name.split("."))
    }


def head_name(model: Any) -> str | None:
    """Name of the linear layer that makes logits of hidden states."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is found), None) if found else None


def planned_schemes(model: Any, layers: Sequence[MoELayer], config: Any) -> dict[str, DenseScheme]:
    """Layers of a model that ``dense_bits`` stores in fewer bits than they have, and how.

    Args:
        layers: with experts.
        config: BitsMoEConfig.

    Raises:
        ConfigError: a pattern names no linear layer outside the experts, or one that cannot be stored so.
    """
    whole = type(config.dense_bits) is int
    table = {"*": config.dense_bits} if whole else config.dense_bits
    if all(bits == 16 for bits in table.values()):
        return {}
    linear, head = linear_layers(model, layers), head_name(model)
    named = {name: _pattern_of(name, table, name == head) for name in linear}
    for pattern in table:
        if not any(_matches(pattern, name) for name in linear):
            raise ConfigError(
                f"BitsMoEConfig: dense_bits names {pattern!r}, but the model has no such linear layer "
                f"outside its routed experts and routers; it has {', '.join(_kinds(linear))}"
            )
    found, left = {}, []
    for name, pattern in named.items():
        if pattern is None or table[pattern] == 16:
            continue
        if name == head:
            _check_untied(model, name)
        scheme = scheme_for(linear[name], table[pattern], config.dense_group_size)
        if scheme is not None:
            found[name] = scheme
        elif "*" in pattern:
            left.append(name)
        else:
            shape = tuple(linear[name].weight.shape)
            raise ConfigError(f"BitsMoEConfig: dense_bits names {pattern!r}, but {name} is {shape}: {_SIZES}")
    return _check_fused(found, linear, left)


_SIZES = f"inputs and outputs must be multiples of {UNIT}; leave it at 16"


def _kinds(names: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def free_layers(model: Any, linear: Mapping[str, nn.Linear], config: Any) -> list[str]:
    """Names of linear layers that ``dense_bits`` says nothing of: all at its default, none at another number,
    and those that no pattern of a table fits. A head that is the embeddings too is left out.

    Args:
        linear: see ``linear_layers``.
        config: BitsMoEConfig.
    """
    head, tied = head_name(model), getattr(model, "all_tied_weights_keys", None) or ()
    table = config.dense_bits if isinstance(config.dense_bits, dict) else {}
    if not table and config.dense_bits != 16:
        return []
    open_ = [name for name in linear if _pattern_of(name, table, name == head) is None]
    return [name for name in open_ if f"{name}.weight" not in tied]


def _matches(pattern: str, name: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _pattern_of(name: str, table: Mapping[str, int], is_head: bool) -> str | None:
    """The first that names a layer; the head is not meant by "*" alone."""
    return next((p for p in table if _matches(p, name) and not (is_head and p == "*")), None)


def scheme_for(module: nn.Linear, bits: int, group_size: int) -> DenseScheme | None:
    """How a layer is stored in so many bits; None if its sizes do not allow it."""
    if module.in_features % UNIT or module.out_features % UNIT:
        return None
    return DenseScheme(bits, group_size if module.in_features % group_size == 0 else min(GROUP_SIZES))


def _check_untied(model: Any, head: str) -> None:
    if f"{head}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
        raise ConfigError(
            f"BitsMoEConfig: dense_bits names {head}, which is the same tensor as the embeddings "
            "(tie_word_embeddings); leave it at 16"
        )


def fused_with(name: str, linear: Mapping[str, Any]) -> list[str]:
    """Names of the layers that vLLM computes as one with a layer, that one included."""
    parent, _, kind = name.rpartition(".")
    fused = next((group for group in _FUSED if kind in group), (kind,))
    names = [f"{parent}.{part}" if parent else part for part in fused]
    return [partner for partner in names if partner in linear]


def _check_fused(
    found: dict[str, DenseScheme], linear: Mapping[str, nn.Linear], left: list[str]
) -> dict[str, DenseScheme]:
    """Refuse layers that vLLM fuses with others of another width; leave those whose partners were left."""
    for name in linear:
        partners = fused_with(name, linear)
        if len({found.get(partner) for partner in partners}) < 2:
            continue
        if not any(partner in left for partner in partners):
            told = ", ".join(f"{p} {found[p].bits if p in found else 16}" for p in partners)
            raise ConfigError(
                f"BitsMoEConfig: dense_bits gives {told} bits, which vLLM computes as one layer; give them "
                "the same"
            )
        for partner in partners:
            if found.pop(partner, None) is not None:
                left.append(partner)
    if left:
        warnings.warn(
            f"dense_bits leaves {', '.join(_kinds(dict.fromkeys(left)))} at 16: {_SIZES}", stacklevel=2
        )
    return found


def saved_names(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Name of each layer -> its name in the files that ``save_pretrained`` writes.

    Raises:
        ConfigError: transformers would write something else than the tensors of such a layer.
    """
    found = _written_names(model, names)
    for name, written in found.items():
        if not written.endswith(f".{PACKED}"):
            raise ConfigError(
                f"BitsMoEConfig: dense_bits names {name}, whose weights transformers converts on saving; "
                "leave it at 16"
            )
    return {name: written.removesuffix(f".{PACKED}") for name, written in found.items()}


def savable_layers(model: Any, names: Sequence[str]) -> list[str]:
    """Those that ``saved_names`` does not refuse."""
    return [name for name, written in _written_names(model, names).items() if written.endswith(f".{PACKED}")]


def _written_names(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Name of each layer -> name of its first stored tensor in the files, "" if it becomes another."""
    probes = {f"{name}.{PACKED}": torch.empty(1, device="meta") for name in names}
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(probes)).items()}
    return {name: saved.get(id(probes[f"{name}.{PACKED}"]), "") for name in names}


def stored_schemes(
    model: Any, layers: Sequence[MoELayer], schemes: Mapping[str, DenseScheme]
) -> dict[str, DenseScheme]:
    """Schemes by the names that layers have in a model, of those by their names in the files.

    Raises:
        CheckpointError: the model lacks a layer, or it cannot be stored so.
    """
    linear = linear_layers(model, layers)
    by_key = {dense_key(written): name for name, written in saved_names(model, list(linear)).items()}
    found = {}
    for written, scheme in schemes.items():
        name = by_key.get(dense_key(written))
        if name is None and "." not in written:  # the head, which a base model lacks
            continue
        if name is None:
            raise CheckpointError(
                f"quantization_config: dense describes {written}, and the model has no such linear layer "
                "outside its experts and routers; config.json was altered"
            )
        module = linear[name]
        if module.in_features % scheme.group_size or module.out_features % UNIT:
            raise CheckpointError(
                f"quantization_config: dense describes {written} in groups of {scheme.group_size}, but it "
                f"has {module.in_features} inputs and {module.out_features} outputs; config.json was altered"
            )
        found[name] = scheme
    return found
