"""Weights that compressed-tensors stored: which of its schemes transformers dequantizes rightly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.stored_tensors import StoredTensor

_FLOATS = ("float-quantized", "naive-quantized")
_PACKED = "pack-quantized"
_PARTS = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape", "weight_g_idx")
"""Beside a weight."""


def check_schemes(
    config: Any, stored: Mapping[str, StoredTensor], is_expert: Callable[[str], bool]
) -> set[str]:
    """Compare weights with their scheme and scales; none is read.

    Args:
        config: of compressed-tensors.
        stored: name -> tensor.
        is_expert: whether a stored tensor is part of a routed expert's weight.

    Returns:
        names of the tensors that are a weight in low precision or belong to one.

    Raises:
        QuantizationError: naming a tensor and the scheme.
    """
    from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

    found: set[str] = set()
    _check_one_scheme(config, stored)
    schemes: dict[bool, Any] = {True: get_experts_scheme(config), False: get_dense_scheme(config)}
    for name, weight in stored.items():
        base, _, end = name.rpartition(".")
        beside = {part: stored[f"{base}.{part}"] for part in _PARTS if f"{base}.{part}" in stored}
        if end in _PARTS and not {f"{base}.weight", f"{base}.weight_packed"} & stored.keys():
            raise QuantizationError(
                f"{weight} is of compressed-tensors, and the weight that it belongs to is missing"
            )
        if end == "weight_packed" or (
            end == "weight" and (beside or weight.dtype[:1] not in "FB" or "F8" in weight.dtype)
        ):
            expert = is_expert(name)
            scheme = _Scheme(config, schemes[expert], expert)
            scheme.check_supported(weight)
            scheme.check_parts(weight, beside)
            found |= {name, *(part.name for part in beside.values())}
    return found


class _Scheme:
    """Of the experts, or of all other weights: transformers takes one for each."""

    def __init__(self, config: Any, scheme: Any, expert: bool) -> None:
        self.weights = scheme.weights
        self.format = str(getattr(scheme.format or config.format, "value", scheme.format or config.format))
        self.expert = expert

    def __str__(self) -> str:
        args = self.weights
        if args is None:
            return f"compressed-tensors {self.format}"
        more = "" if args.symmetric else ", asymmetric"
        if args.actorder:
            more += f", actorder {getattr(args.actorder, 'value', args.actorder)}"
        return f"compressed-tensors {self.format} ({args.type} {args.num_bits}, {args.strategy}{more})"

    def check_supported(self, weight: StoredTensor) -> None:
        args = self.weights
        blocks = () if self.expert else ("block",)
        known = args is not None and args.symmetric and not args.actorder
        floats = known and self.format in _FLOATS and (args.type, args.num_bits) == ("float", 8)
        floats = floats and args.strategy in ("tensor", "channel", *blocks) and weight.dtype == "F8_E4M3"
        packed = known and self.format == _PACKED and args.type == "int" and args.num_bits in (4, 8)
        packed = packed and args.strategy in ("group", "channel") and weight.dtype == "I32"
        if not (floats or packed):
            kind = "a routed expert's weight" if self.expert else "a weight"
            raise QuantizationError(
                f"{weight}, {kind} in {self}: transformers does not dequantize it; supported are "
                "FP8 per tensor and per channel, and packed INT4 and INT8, symmetric and without actorder. "
                "Give a checkpoint in those or in bfloat16"
            )

    def check_parts(self, weight: StoredTensor, beside: Mapping[str, StoredTensor]) -> None:
        wanted = {"weight_scale"} | ({"weight_shape"} if self.format == _PACKED else set())
        missing = sorted(wanted - beside.keys())
        if missing:
            raise QuantizationError(
                f"{weight} is stored in {self}, and its {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing"
            )
        unknown = sorted(beside.keys() - wanted)
        if unknown:
            raise QuantizationError(f"{beside[unknown[0]]} does not belong to {self} of {weight}")
        if not self._fits(weight, beside["weight_scale"]):
            raise QuantizationError(
                f"{beside['weight_scale']} does not fit {weight} in {self}: the group or block size in "
                "config.json does not divide it, or the scales are of another checkpoint"
            )

    def _fits(self, weight: StoredTensor, scales: StoredTensor) -> bool:
        rows, columns = weight.shape[-2:] if len(weight.shape) == 2 else (0, 0)
        args = self.weights
        if args.strategy == "tensor":
            return scales.count == 1
        if args.strategy == "channel":
            return scales.shape == (rows, 1)
        if args.strategy == "block":
            height, width = args.block_structure
            return scales.shape == (-(-rows // height), -(-columns // width))
        per_word = 32 // args.num_bits
        covered = scales.shape[-1] * args.group_size if len(scales.shape) == 2 else 0
        return scales.shape[:1] == (rows,) and (columns - 1) * per_word < covered <= columns * per_word


def _check_one_scheme(config: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse several schemes where transformers would take the first for all."""
    name = next((name for name in stored if name.endswith(".weight_scale")), "the model")
    kinds: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for group, scheme in config.config_groups.items():
        of_experts = any(target.startswith("re:") and "experts" in target for target in scheme.targets)
        kinds[of_experts][f"{scheme.weights} {scheme.format}"] = group
    for groups in kinds.values():
        if len(groups) > 1:
            raise QuantizationError(
                f"{name}: compressed-tensors has several schemes ({', '.join(groups.values())} in "
                "config_groups), of which transformers dequantizes by one; give a checkpoint in bfloat16"
            )
