"""The manifest of a packed checkpoint: sizes and hashes of what every MoE layer must hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitsmoe_plugin.codec import layout, packed_values, row_codec
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.families import layer_shape
from bitsmoe_plugin.models.files import tensor_files
from bitsmoe_plugin.models.layer_names import stored_key
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

_SIZES = ("num_experts", "hidden_size", "intermediate_size", "payload_words")
_LARGEST = {"num_experts": 2**16, "hidden_size": 2**18, "intermediate_size": 2**18, "payload_words": 2**38}
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
    extra: dict[str, Any] = {}
    if packed.input_bias is not None:
        extra["has_bias"] = True
    if kept:
        extra["kept_experts"] = list(kept)
    if extra:
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
    is_tiled = config.grid == row_codec.TILED
    for key in (*_SIZES, "stored_rows") if is_tiled else _SIZES:
        value = entry.get(key)
        least = 0 if key in ("payload_words", "stored_rows") else 1
        if type(value) is not int or not least <= value <= _LARGEST[key]:
            raise CheckpointError(
                f"{name}: {key}={str(value)[:80]!r} in quantization_config is not a sensible size"
            )
    shape = LayerShape(entry["num_experts"], entry["hidden_size"], entry["intermediate_size"])
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
        input_bases=config.input_bases,
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
            f"{name}: the model has (experts, hidden_size, intermediate_size) = {wanted}, "
            f"the quantization_config {found}; config.json was altered"
        )


_DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}


@dataclass(frozen=True)
class StoredTensor:
    """A packed tensor as a file's header describes it; dtype in the notation of safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    def read(self) -> Tensor:
        """The tensor itself."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name)


def stored_tensors(files: Iterable[str | Path]) -> dict[tuple[str, str], StoredTensor]:
    """``stored_key`` -> every packed tensor of some safetensors files, read from the headers alone.

    Raises:
        CheckpointError: a file is no safetensors file, a name stands twice, or two tensors have the same
            key.
    """
    found: dict[tuple[str, str], StoredTensor] = {}
    paths = [Path(file) for file in files]
    tensor_files(paths)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in list(file.keys()) if ".bitsmoe_" in name]
                slices = {name: file.get_slice(name) for name in names}
                tensors = [
                    StoredTensor(name, header.get_dtype(), tuple(header.get_shape()), path)
                    for name, header in slices.items()
                ]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error
        for tensor in tensors:
            twin = found.setdefault(stored_key(tensor.name), tensor)
            if twin is not tensor:
                raise CheckpointError(f"{tensor.name} in {path} stands a second time in {twin.file}")
    return found


def verify_headers(found: dict[tuple[str, str], StoredTensor], specs: dict[str, PackedSpec]) -> None:
    """Refuse packed tensors that are not exactly those of the config, before any is read.

    Args:
        found: from ``stored_tensors``.
        specs: module path of each layer -> its sizes.

    Raises:
        CheckpointError: naming the tensor that is missing, surplus or of another dtype or shape.
    """
    surplus = dict(found)
    for layer, spec in specs.items():
        for buffer, (dtype, shape) in spec.tensors().items():
            tensor = surplus.pop(stored_key(f"{layer}.{buffer}"), None)
            if tensor is None:
                raise CheckpointError(f"{layer}.{buffer} is missing from the checkpoint")
            if (_DTYPES.get(tensor.dtype), tensor.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{tensor.name} is {tensor.dtype} {tensor.shape}, but the config asks for {dtype} "
                    f"{shape}; the checkpoint was altered or belongs to another config"
                )
    if surplus:
        name = next(iter(surplus.values())).name
        raise CheckpointError(f"{name} is in the checkpoint, but not in its quantization_config")


def verify_experts(name: str, module: BitsMoEExperts, config: BitsMoEConfig) -> None:
    """Check sizes, structure and hash of a loaded layer.

    Raises:
        CheckpointError: the layer is incomplete or altered.
    """
    module.verify(name)
    verify_packed(name, module.spec, module.packed(), config)


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
