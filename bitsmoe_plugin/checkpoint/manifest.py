"""The manifest of a packed checkpoint: sizes and hashes of what every MoE layer must hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch

from bitsmoe_plugin.codec import layout, packed_values, row_codec
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.families import layer_shape

_SIZES = ("num_experts", "hidden_size", "intermediate_size", "payload_words")
_LARGEST = {"num_experts": 2**16, "hidden_size": 2**18, "intermediate_size": 2**18, "payload_words": 2**38}

TAGS = ("bitsmoe", "mixture-of-experts", "quantized")
"""By which the hub finds it."""
_LARGEST["stored_rows"] = 3 * _LARGEST["num_experts"] * _LARGEST["hidden_size"]


def tensor_digest(packed: PackedExperts) -> str:
    """SHA-256 over names and bytes of the packed tensors."""
    digest = hashlib.sha256()
    for name, tensor in packed.tensors():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy().data)
    return digest.hexdigest()


def layer_manifest(
    shape: LayerShape, packed: PackedExperts, original_dtype: torch.dtype, kept: Sequence[int] = ()
) -> dict[str, Any]:
    """Entry of one layer in ``BitsMoEConfig.layers``.

    Args:
        original_dtype: of biases and kept experts.
        kept: ids of the experts that are stored as they were.
    """
    extra: dict[str, Any] = {} if shape.has_gate else {"has_gate": False}
    if packed.input_bias is not None:
        extra["has_bias"] = True
    if kept:
        extra["kept_experts"] = list(kept)
    if packed.input_bias is not None or kept:
        extra["original_dtype"] = str(original_dtype).removeprefix("torch.")
    if packed.row_gains is not None:
        extra["stored_rows"] = packed.row_gains.numel()
    return {
        **extra,
        "num_experts": shape.num_experts,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "payload_words": packed.payload.numel(),
        "sha256": tensor_digest(packed),
    }


def packed_spec(name: str, config: BitsMoEConfig) -> PackedSpec:
    """Sizes of one layer from the config of a checkpoint.

    Raises:
        CheckpointError: the layer is not in the manifest, or its sizes are not sensible.
    """
    entry = config.layers.get(name)
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"the model has routed experts at {name}, but the checkpoint's quantization_config describes "
            f"{', '.join(sorted(config.layers)) or 'no layers'}; its config.json is incomplete"
        )
    return entry_spec(name, entry, config)


def entry_spec(name: str, entry: dict[str, Any], config: BitsMoEConfig) -> PackedSpec:
    """Sizes of a layer from its entry in ``BitsMoEConfig.layers`` and the options.

    Raises:
        CheckpointError: they are not sensible.
    """
    is_tiled = config.grid == row_codec.TILED
    for key in (*_SIZES, "stored_rows") if is_tiled else _SIZES:
        value = entry.get(key)
        least = 0 if key in ("payload_words", "stored_rows") else 1
        if type(value) is not int or not least <= value <= _LARGEST[key]:
            raise CheckpointError(
                f"{name}: {key}={str(value)[:80]!r} in quantization_config is not a sensible size"
            )
    has_gate = entry.get("has_gate", True)
    if type(has_gate) is not bool:
        raise CheckpointError(f"{name}: has_gate={str(has_gate)[:80]!r} in quantization_config is no bool")
    shape = LayerShape(entry["num_experts"], entry["hidden_size"], entry["intermediate_size"], has_gate)
    if config.basis_bits != 16 and shape.hidden_size % config.basis_group_size:
        raise CheckpointError(
            f"{name}: basis_group_size {config.basis_group_size} does not divide hidden_size "
            f"{shape.hidden_size}; config.json was altered"
        )
    return PackedSpec(
        shape=shape,
        widths=config.widths,
        basis_bits=config.basis_bits,
        basis_group_size=config.basis_group_size,
        input_bases=min(config.input_bases, shape.inputs),
        payload_words=entry["payload_words"],
        grid=config.grid,
        stored_rows=entry["stored_rows"] if is_tiled else 0,
        **_originals(name, entry, shape.num_experts),
    )


def _originals(name: str, entry: dict[str, Any], experts: int) -> dict[str, Any]:
    """What the manifest says about tensors that are stored as they were."""
    has_bias, kept = entry.get("has_bias", False), entry.get("kept_experts", [])
    dtype = entry.get("original_dtype", "bfloat16")
    ids = isinstance(kept, list) and all(type(e) is int and 0 <= e < experts for e in kept)
    if not ids or sorted(set(kept)) != kept:
        raise CheckpointError(
            f"{name}: kept_experts={str(kept)[:80]} is no rising list of ids below {experts}"
        )
    if type(has_bias) is not bool or not isinstance(dtype, str) or dtype not in layout.ORIGINAL_DTYPES:
        raise CheckpointError(
            f"{name}: has_bias={str(has_bias)[:80]}, original_dtype={str(dtype)[:80]} are not sensible"
        )
    return {"has_bias": has_bias, "kept": tuple(kept), "original_dtype": dtype}


def check_shape(name: str, spec: PackedSpec, module: Any) -> None:
    """Refuse a manifest whose sizes differ from the experts module of the model."""
    wanted, found = astuple(layer_shape(module)), astuple(spec.shape)
    if wanted != found:
        raise CheckpointError(
            f"{name}: the model has (experts, hidden_size, intermediate_size, has_gate) = {wanted}, "
            f"the quantization_config {found}; config.json was altered"
        )


def verify_packed(name: str, spec: PackedSpec, packed: PackedExperts, config: BitsMoEConfig) -> None:
    """Refuse packed tensors that were altered, and values that no kernel must see.

    Args:
        packed: of the dtypes and shapes of ``spec``.

    Raises:
        CheckpointError: naming the layer, and the tensor if its hash fits and its values do not.
    """
    verify_digest(name, packed, config)
    packed_values.check_packed(name, spec, packed)


def verify_digest(name: str, packed: PackedExperts, config: BitsMoEConfig) -> None:
    """Refuse packed tensors other than those that were written.

    Raises:
        CheckpointError: naming the layer.
    """
    if tensor_digest(packed) != config.layers[name].get("sha256"):
        raise CheckpointError(
            f"{name}: packed tensors do not match their SHA-256 in quantization_config; "
            "the checkpoint is damaged or altered, download or quantize it again"
        )
