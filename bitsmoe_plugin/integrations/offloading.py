"""Packed models of which a part is offloaded to a CPU or disk, or on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.accelerate import get_device

from bitsmoe_plugin.checkpoint.manifest import verify_packed
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.integrations.spread_state import value_of
from bitsmoe_plugin.runtime import batch_invariance
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


def check_for_quantization(device_map: Any, distributed: Any) -> None:
    """Refuse to quantize a model that will not be whole in memory.

    Args:
        device_map: of transformers; a name like "auto" is checked once it is a map.
        distributed: transformers' DistributedConfig, None for one process.

    Raises:
        ConfigError: naming what spreads it.
    """
    remedy = "load the model on the CPU alone or with a device_map of GPUs alone, quantize and save it first"
    if distributed is not None:
        raise ConfigError(f"a model is not quantized while distributed_config or tp_plan splits it; {remedy}")
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    for device in ("disk", "meta", *(["cpu"] if len(devices) > 1 else [])):
        if device in devices:
            raise ConfigError(
                f"a model is not quantized while device_map={device_map} puts a part on {device}; {remedy}"
            )


def check_invariance(device_map: Any) -> None:
    """Refuse devices whose kernels give a token another output in another batch, if that was asked for.

    Raises:
        ConfigError: naming the device, or a switch that is neither on nor off.
    """
    if batch_invariance.is_wanted() and isinstance(device_map, dict):
        for device in device_map.values():
            if device not in ("disk", "meta"):
                batch_invariance.refuse_device("cuda" if isinstance(device, int) else device)


def verify_layers(model: Any, config: BitsMoEConfig, device_map: Any) -> None:
    """Check the packed tensors of a loaded model, layer by layer, those that are offloaded too.

    Args:
        device_map: that it was loaded with; what it puts on the meta device has no values to check.

    Raises:
        CheckpointError: a layer is incomplete or altered.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BitsMoEExperts):
            continue
        tensors = dict(module.packed().tensors())
        if not any(tensor.is_meta for tensor in tensors.values()):
            verify_experts(name, module, config)
        elif not _is_for_meta(device_map, name):
            values = {buffer: value_of(model, f"{name}.{buffer}", t) for buffer, t in tensors.items()}
            packed = PackedExperts(**{k.removeprefix("bitsmoe_"): v for k, v in values.items()})
            verify_packed(name, module.spec, packed, config)


def _is_for_meta(device_map: Any, name: str) -> bool:
    return isinstance(device_map, dict) and torch.device("meta") == _device(get_device(device_map, name))


def _device(place: Any) -> Any:
    return torch.device(place) if place != "disk" else place


def verify_experts(name: str, module: BitsMoEExperts, config: BitsMoEConfig) -> None:
    """Check sizes, structure and hash of a loaded layer.

    Raises:
        CheckpointError: the layer is incomplete or altered.
    """
    module.verify(name)
    verify_packed(name, module.spec, module.packed(), config)
