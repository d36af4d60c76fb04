"""The manifest of a packed checkpoint: sizes and hashes of what every MoE layer must hold."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.experts import BitsMoEExperts, PackedSpec
from bitsmoe_plugin.packing import LayerShape, PackedExperts

_SIZES = ("num_experts", "hidden_size", "intermediate_size", "payload_words")
_LARGEST = {"num_experts": 2**16, "hidden_size": 2**18, "intermediate_size": 2**18, "payload_words": 2**38}


def tensor_digest(packed: PackedExperts) -> str:
    """SHA-256 over names and bytes of the packed tensors."""
    digest = hashlib.sha256()
    for name, tensor in packed.tensors():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def layer_manifest(shape: LayerShape, packed: PackedExperts) -> dict[str, Any]:
    """Entry of one layer in ``BitsMoEConfig.layers``."""
    return {
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
    for key in _SIZES:
        value = entry.get(key)
        least = 0 if key == "payload_words" else 1
        if not isinstance(value, int) or not least <= value <= _LARGEST[key]:
            raise CheckpointError(f"{name}: {key}={value!r} in quantization_config is not a sensible size")
    shape = LayerShape(entry["num_experts"], entry["hidden_size"], entry["intermediate_size"])
    return PackedSpec(
        shape, config.widths, config.basis_bits, config.basis_group_size, entry["payload_words"]
    )


def check_shape(name: str, spec: PackedSpec, module: Any) -> None:
    """Refuse a manifest whose sizes differ from the experts module ``[E, H, I]`` of the model."""
    wanted = tuple(module.down_proj.shape)
    found = (spec.shape.num_experts, spec.shape.hidden_size, spec.shape.intermediate_size)
    if wanted != found:
        raise CheckpointError(
            f"{name}: the model has (experts, hidden_size, intermediate_size) = {wanted}, "
            f"the quantization_config {found}; config.json was altered"
        )


def verify_experts(name: str, module: BitsMoEExperts, config: BitsMoEConfig) -> None:
    """Check sizes, structure and hash of a loaded layer.

    Raises:
        CheckpointError: the layer is incomplete or altered.
    """
    module.verify(name)
    if tensor_digest(module.packed()) != config.layers[name].get("sha256"):
        raise CheckpointError(
            f"{name}: packed tensors do not match their SHA-256 in quantization_config; "
            "the checkpoint is damaged or altered, download or quantize it again"
        )
