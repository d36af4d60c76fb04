"""Weights that replace those of a running engine: of a checkpoint that it names, or from a stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import ModelConfig, get_current_vllm_config_or_none
from vllm.transformers_utils.config import get_config

from bitsmoe_plugin.checkpoint.manifest import tensor_digest, verify_packed
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.codec import packed_values
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.config import QUANT_METHOD
from bitsmoe_plugin.errors import CheckpointError


def engine_model() -> ModelConfig | None:
    """What the engine serves, None where vLLM does not say so.

    ``reload_weights(weights_path=...)`` changes it before it reads.
    """
    config = get_current_vllm_config_or_none()
    return None if config is None else config.model_config


def read_manifest(model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """config.json of a model as it is now, and its ``quantization_config``.

    Raises:
        CheckpointError: it is not packed.
    """
    hf_config = get_config(model.model, model.trust_remote_code, model.revision)
    text = getattr(hf_config, "text_config", None)
    entries = getattr(hf_config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not isinstance(entries, dict) or entries.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{model.model} is not packed, and packed experts cannot take its weights; quantize it "
            "(bitsmoe quantize MODEL OUT) and reload OUT"
        )
    return hf_config, entries


def verify_streamed(name: str, files: PackedFiles, packed: PackedExperts) -> PackedSpec:
    """Sizes of a whole layer that came tensor by tensor, checked.

    Of a reload from disk these are the tensors of the checkpoint, which its manifest describes. Others come
    without a manifest; they are taken as packed with the options of that checkpoint.

    Args:
        name: of the layer.
        files: the checkpoint that the engine names.

    Raises:
        CheckpointError: damaged, or not a sound layer of the same experts.
    """
    digest = tensor_digest(packed)
    described = digest == files.config.layers[name].get("sha256")
    if described or _are_stored(name, files, packed):
        verify_packed(name, files.specs[name], packed, files.config)
        return files.specs[name]
    spec = replace(
        files.specs[name],
        payload_words=packed.payload.numel(),
        stored_rows=0 if packed.row_gains is None else packed.row_gains.numel(),
    )
    _check_tensors(name, spec, dict(packed.tensors()))
    packed_values.check_packed(name, spec, packed)
    return spec


def _are_stored(name: str, files: PackedFiles, packed: PackedExperts) -> bool:
    """Whether these are the bytes of the checkpoint, whatever its manifest says of them."""
    stored = files.stored(name)
    found = dict(packed.tensors())
    return stored.keys() == found.keys() and all(
        tensor.shape == found[buffer].shape and bool((tensor == found[buffer].cpu()).all())
        for buffer, tensor in stored.items()
    )


def _check_tensors(name: str, spec: PackedSpec, found: dict[str, Tensor]) -> None:
    wanted = spec.tensors()
    for buffer in sorted(wanted.keys() ^ found.keys()):
        raise CheckpointError(
            f"{name}.{buffer} is {'missing' if buffer in wanted else 'surplus'}: weights without a manifest "
            "must be packed like those that are served; reload from a checkpoint's path instead"
        )
    for buffer, (dtype, shape) in wanted.items():
        tensor = found[buffer]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise CheckpointError(
                f"{name}.{buffer} is {tensor.dtype} {tuple(tensor.shape)}, but {dtype} {shape} is served; "
                "reload from a checkpoint's path, whose manifest describes it"
            )
