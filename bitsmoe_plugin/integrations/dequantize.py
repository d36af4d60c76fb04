"""``model.dequantize()``: a packed model as the dense model of its class that it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.integrations.parameter_count import as_unpacked
from bitsmoe_plugin.models.families import fused_parameters
from bitsmoe_plugin.runtime.decoding import decode_biases, decode_weights
from bitsmoe_plugin.runtime.dense_linear import make_dense, quantized_linears
from bitsmoe_plugin.runtime.experts import BitsMoEExperts, replace_module


def dequantize_model(model: Any, dtype: torch.dtype) -> None:
    """Put dense experts where the packed ones are, layer by layer, on the device of each.

    Args:
        model: of transformers, with packed experts.
        dtype: of the experts, and of all parameters that are of the model's dtype.

    Raises:
        ConfigError: ``dtype`` is none for weights, or experts are offloaded or split over processes.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"dequantize: dtype={dtype} is no floating point type; give torch.bfloat16")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BitsMoEExperts)}
    for name, module in layers.items():
        _check_whole(name, module)
    for linear in quantized_linears(model).values():
        make_dense(linear)
    _convert_others(model, dtype)
    for name, module in layers.items():
        replace_module(model, name, dense_experts(module, dtype))
    as_unpacked(model)
    vars(model).pop("_ddp_params_and_buffers_to_ignore", None)


def _check_whole(name: str, module: BitsMoEExperts) -> None:
    remedy = "load all of the model into one process, or write a dense one with `bitsmoe dequantize`"
    if any(tensor.is_meta for tensor in module.parameters()):
        raise ConfigError(f"dequantize: {name} is offloaded; {remedy}")
    if module.spec.shape != module.whole_shape:
        raise ConfigError(f"dequantize: {name} is split over processes (tensor or expert parallel); {remedy}")


def _convert_others(model: nn.Module, dtype: torch.dtype) -> None:
    """Those that transformers keeps in another dtype than the model's keep it."""
    former = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == former:
            parameter.data = parameter.data.to(dtype)


def dense_experts(module: BitsMoEExperts, dtype: torch.dtype) -> nn.Module:
    """The replaced module, with its parameters back."""
    packed, original = module.packed(), module.original
    parameters = fused_parameters(
        original, decode_weights(module.spec, packed, dtype), decode_biases(module.spec, packed, dtype)
    )
    for name, tensor in parameters.items():
        setattr(original, name, nn.Parameter(tensor))
    return original.train(module.training)
