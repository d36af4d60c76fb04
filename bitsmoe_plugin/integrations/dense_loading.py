"""Linear layers in 8 or 4 bits of a model that is loaded or saved."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitsmoe_plugin.codec.dense import DenseScheme, dense_schemes
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.integrations.parallel import distributed_config
from bitsmoe_plugin.models.dense_layers import stored_schemes
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.runtime.dense_linear import (
    check_library,
    fill,
    make_empty,
    packed_again,
    quantized_linears,
)


def empty_linears(model: Any, config: BitsMoEConfig, device_map: Any) -> dict[str, DenseScheme]:
    """Have the layers that ``config.dense`` describes take stored tensors.

    Args:
        model: on the meta device, its experts still the original ones.

    Returns:
        scheme of each, by its name in the model.

    Raises:
        CheckpointError: the section was altered, or is of another model.
        ConfigError: the library is missing, or the model is spread in a way that is not supported.
    """
    if not config.dense:
        return {}
    check_library()
    _check_spread(model, device_map)
    found = stored_schemes(model, find_moe_layers(model), dense_schemes(config.dense))
    for name, scheme in found.items():
        make_empty(model.get_submodule(name), scheme)
    return found


def _check_spread(model: Any, device_map: Any) -> None:
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    offloaded = devices & {"disk", "meta", *(["cpu"] if len(devices) > 1 else [])}
    if distributed_config(model) is not None or offloaded:
        what = f"device_map puts a part on {min(offloaded)}" if offloaded else "processes share it"
        raise ConfigError(
            "this checkpoint has linear layers in 8 or 4 bits (dense_bits), which transformers unpacks while "
            f"it loads, and {what}; load it on one device or on GPUs alone, serve it with vLLM, or write a "
            "dense model with `bitsmoe dequantize`"
        )


def fill_linears(model: Any, schemes: dict[str, DenseScheme]) -> None:
    """Unpack the layers that ``empty_linears`` has prepared, once they are loaded.

    Raises:
        CheckpointError: a layer is incomplete or altered.
    """
    for name, scheme in schemes.items():
        fill(name, model.get_submodule(name), scheme)


def with_packed_linears(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model as it is saved, of that which it has.

    Raises:
        CheckpointError: see ``packed_again``.
    """
    found = dict(state)
    for name, module in quantized_linears(model).items():
        del found[f"{name}.weight"]
        found |= {f"{name}.{part}": tensor for part, tensor in packed_again(name, module).items()}
    return found
