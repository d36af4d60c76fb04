"""Linear layers in 8 or 4 bits as modules of transformers, through the library compressed-tensors.

Like that library, transformers computes them unpacked: a layer is an ordinary ``nn.Linear`` with the values
that its codes stand for, and is packed again to be saved.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.codec.dense import PACKED, SCALE, SHAPE, DenseScheme, check_stored, dense_section
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.models.dense_layers import saved_names

_SCHEME, _SCALES = "bitsmoe_scheme", "bitsmoe_scales"


def check_library() -> None:
    """Raises ConfigError if compressed-tensors is not installed."""
    if find_spec("compressed_tensors") is None:
        raise ConfigError(
            "dense_bits: linear layers in 8 or 4 bits need the package compressed-tensors; "
            'pip install "bitsmoe-plugin[dense]"'
        )


def pack(codes: Tensor, scales: Tensor, scheme: DenseScheme) -> dict[str, Tensor]:
    """Stored tensors by name, of ``[outputs, inputs]`` int8 and ``[outputs, groups]``."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    shape = torch.tensor(codes.shape)
    return {PACKED: pack_to_int32(codes, scheme.bits), SCALE: scales, SHAPE: shape}


def unpack(tensors: dict[str, Tensor], scheme: DenseScheme) -> Tensor:
    """The weight ``[outputs, inputs]``, of the dtype of its scales."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    own = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.weight_args()))
    weight: Tensor = PackedQuantizationCompressor.decompress(tensors, own)["weight"]
    return weight


def make_empty(module: nn.Linear, scheme: DenseScheme) -> None:
    """Have a layer without data take stored tensors instead of a weight."""
    dtype, device = module.weight.dtype, module.weight.device
    shapes = scheme.shapes(*module.weight.shape)
    del module.weight
    for name, kind in ((PACKED, torch.int32), (SCALE, dtype), (SHAPE, torch.int64)):
        empty = torch.empty(shapes[name], dtype=kind, device=device)
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def fill(name: str, module: nn.Linear, scheme: DenseScheme) -> None:
    """Unpack a layer from the tensors that were loaded into it.

    Args:
        name: of the layer, for errors.

    Raises:
        CheckpointError: they are not there, or not those of such a layer.
    """
    tensors = {part: getattr(module, part).detach() for part in (PACKED, SCALE, SHAPE)}
    check_stored(name, tensors, scheme, (module.out_features, module.in_features))
    for part in tensors:
        delattr(module, part)
    put(module, tensors, scheme)


def read_weight(name: str, tensors: dict[str, Tensor], scheme: DenseScheme) -> Tensor:
    """``unpack`` of tensors that were read from a file.

    Raises:
        CheckpointError: see ``check_stored``.
        ConfigError: see ``check_library``.
    """
    check_library()
    check_stored(name, tensors, scheme)
    return unpack(tensors, scheme)


def put(module: nn.Linear, tensors: dict[str, Tensor], scheme: DenseScheme) -> None:
    """Give a layer the weight that stored tensors stand for."""
    device = module.weight.device if hasattr(module, "weight") else tensors[PACKED].device
    module.weight = nn.Parameter(unpack(tensors, scheme).to(device), requires_grad=False)
    module.register_buffer(_SCALES, tensors[SCALE].to(device), persistent=False)
    setattr(module, _SCHEME, scheme)


def scheme_of(module: Any) -> DenseScheme | None:
    """None for a layer that is not stored in fewer bits."""
    return getattr(module, _SCHEME, None)


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Layers that are stored in fewer bits than they are computed in, by name."""
    return {name: module for name, module in model.named_modules() if scheme_of(module) is not None}  # type: ignore[misc]


def stored_names(model: nn.Module) -> set[str]:
    """Names of the tensors that are saved of such layers."""
    return {f"{name}.{part}" for name in quantized_linears(model) for part in (PACKED, SCALE, SHAPE)}


def packed_again(name: str, module: nn.Linear) -> dict[str, Tensor]:
    """Stored tensors of a layer by name, the very ones that it was unpacked from.

    Raises:
        CheckpointError: its weight is no longer what codes and scales stand for.
    """
    scheme, scales = getattr(module, _SCHEME), getattr(module, _SCALES)
    weight = module.weight.detach()
    groups = weight.float().unflatten(1, (-1, scheme.group_size))
    codes = (groups / scales[..., None].float()).round_()
    codes = codes.nan_to_num_(0).clamp_(-scheme.largest - 1, scheme.largest).to(torch.int8).flatten(1)
    tensors = pack(codes, scales, scheme)
    if scales.dtype != weight.dtype or not torch.equal(unpack(tensors, scheme), weight):
        raise CheckpointError(
            f"{name}: the weight has changed since it was loaded, and it is stored in {scheme.bits} bits; "
            "model.dequantize() makes it one that can be changed and saved (for another dtype: load with "
            "dtype=)"
        )
    return tensors


def dense_manifest(model: Any) -> dict[str, Any]:
    """``BitsMoEConfig.dense`` of a quantized model."""
    layers = quantized_linears(model)
    written = saved_names(model, list(layers))
    schemes = {written[name]: scheme_of(module) for name, module in layers.items()}
    return dense_section({name: scheme for name, scheme in schemes.items() if scheme is not None})


def make_dense(module: nn.Linear) -> None:
    """Forget that a layer was stored in fewer bits."""
    delattr(module, _SCHEME)
    delattr(module, _SCALES)
    module.weight.requires_grad_(True)
