"""Stored tensors of a checkpoint in low precision: each weight has its scales, of a shape that can be right.

What transformers makes of a weight whose scales are missing or of another block size is noise, or an error of
its own when half of the model is loaded. Names, dtypes and shapes are looked at first; of the tensors, only
scales are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.compressed_schemes import check_schemes
from bitsmoe_plugin.models.files import open_tensors
from bitsmoe_plugin.models.low_precision import FUSED, LowPrecision
from bitsmoe_plugin.models.stored_tensors import StoredTensor

_FP8 = ("F8_E4M3", "F8_E5M2")
_FP8_SCALES = ("weight_scale_inv", "scale", "qscale_weight")
_FP4_BLOCK = 32
_ACTIVATIONS = frozenset(
    {"activation_scale", "input_scale", "input_zero_point", "output_scale"}
    | {f"{part}_scale" for part in ("q", "k", "v", "kv", "prob", "prob_output")}
)
"""Scales of inputs and of cached keys and values, which stay in 16 bits here: they are left out."""
_MXFP4_BYTES = 16
"""Two values in each, which share a scale."""


def check_stored(
    source: LowPrecision, stored: Mapping[str, StoredTensor], is_expert: Callable[[str], bool]
) -> set[str]:
    """Compare weights in low precision with their scales; none is read.

    Args:
        stored: from ``stored_tensors.read_headers``.
        is_expert: whether a stored tensor is, or is part of, a routed expert's weight.

    Returns:
        names of the tensors that are a weight in low precision or belong to one.

    Raises:
        QuantizationError: naming a tensor and the scheme.
    """
    if source.method == "mxfp4":
        found = _check_mxfp4(stored)
    elif source.method == "compressed-tensors":
        found = check_schemes(source.quantizer.compressor.quantization_config, stored, is_expert)
    else:
        found = _check_fp8(source, stored, is_expert)
    return found | _of_activations(stored)


def _of_activations(stored: Mapping[str, StoredTensor]) -> set[str]:
    """Scales of activations of modules that have weights, in themselves or below."""
    weights = {name.rpartition(".")[0] for name in stored if name.rpartition(".")[2] not in _ACTIVATIONS}
    modules = weights | {name.rpartition(".")[0] for name in weights}
    candidates = (name.rpartition(".") for name in stored)
    return {f"{base}.{end}" for base, _, end in candidates if end in _ACTIVATIONS and base in modules}


def check_finite(source: LowPrecision, stored: Mapping[str, StoredTensor], names: Iterable[str]) -> None:
    """Read scales and refuse those that are no numbers.

    Args:
        names: from ``check_stored``; those of scales are read.

    Raises:
        QuantizationError: naming the tensor and the scheme.
    """
    scales = sorted(name for name in names if "scale" in name.rpartition(".")[2])
    for path in sorted({stored[name].path for name in scales}):
        with open_tensors(path) as file:
            for name in (name for name in scales if stored[name].path == path):
                if not _is_finite(file.get_tensor(name)):
                    raise QuantizationError(
                        f"{name}, scales of {source.method}, holds values that are no finite numbers; the "
                        "file is damaged, get it again"
                    )


def _is_finite(scales: torch.Tensor) -> bool:
    if scales.dtype == torch.uint8:  # exponents, of which the last means NaN
        return not bool((scales == 255).any())
    return bool(torch.isfinite(scales.float()).all())


def _check_mxfp4(stored: Mapping[str, StoredTensor]) -> set[str]:
    found = set()
    for name, blocks in stored.items():
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" not in stored:
            raise QuantizationError(f"{blocks} are scales of mxfp4, and their _blocks are missing")
        if name.endswith("_blocks"):
            scales = stored.get(f"{name.removesuffix('_blocks')}_scales")
            if scales is None:
                raise QuantizationError(f"{blocks} is stored in mxfp4, and its _scales are missing")
            right = blocks.dtype == scales.dtype == "U8" and blocks.shape[-1:] == (_MXFP4_BYTES,)
            if not right or scales.shape != blocks.shape[:-1]:
                raise QuantizationError(
                    f"{blocks} does not go with {scales}: mxfp4 has {_MXFP4_BYTES} bytes per scale, in U8"
                )
            found |= {name, scales.name}
    return found


def _check_fp8(
    source: LowPrecision, stored: Mapping[str, StoredTensor], is_expert: Callable[[str], bool]
) -> set[str]:
    found: set[str] = set()
    for name, weight in stored.items():
        base, _, end = name.rpartition(".")
        ends = [f"{end}_scale_inv"] if end in FUSED else list(_FP8_SCALES)
        scales = [stored[f"{base}.{s}"] for s in ends if f"{base}.{s}" in stored]
        if end not in ("weight", *FUSED) or not (_is_coarse(weight) or scales):
            continue
        if not _is_coarse(weight):
            raise QuantizationError(
                f"{weight} is not in low precision, but has scales of {source.method}: {scales[0]}"
            )
        if len(scales) != 1:
            missing = "its scales are missing" if not scales else f"has {len(scales)} tensors of scales"
            raise QuantizationError(
                f"{weight} is stored in {source.method}, and {missing} ({base}.{ends[0]})"
            )
        _check_grid(source, weight, scales[0], is_expert(name))
        found |= {name, scales[0].name}
    for name in stored.keys() - found:
        if name.endswith("_scale_inv"):
            raise QuantizationError(
                f"{stored[name]} are scales of {source.method}, and their weight is missing"
            )
    return found


def _is_coarse(weight: StoredTensor) -> bool:
    return weight.dtype in (*_FP8, "I8", "F4")


def _check_grid(source: LowPrecision, weight: StoredTensor, scales: StoredTensor, expert: bool) -> None:
    """Refuse scales that are not one per block."""
    if len(weight.shape) < 2:
        raise QuantizationError(f"{weight} is stored in {source.method}, which is for matrices")
    if weight.dtype == "F4":
        raise QuantizationError(
            f"{weight}: safetensors does not read this dtype in parts; give a checkpoint that holds two "
            "values in each I8, or one in bfloat16"
        )
    if weight.dtype not in _FP8:  # two values per byte
        rows, columns = weight.shape[-2], 2 * weight.shape[-1]
        block: Any = (1, _FP4_BLOCK)
    else:
        (rows, columns), block = weight.shape[-2:], source.block
    if block is None:
        if scales.count == 1 or scales.shape in ((rows, 1), (*weight.shape[:-2], 1, 1)):
            return
        wanted = "one, or one per row"
    else:
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        wanted = f"{list(grid)}, of blocks of {block[0]}x{block[1]}"
        if tuple(scales.shape) == (*weight.shape[:-2], *grid):
            partial = [size for size, b in ((rows, block[0]), (columns, block[1])) if size > b and size % b]
            if expert and partial:
                raise QuantizationError(
                    f"{weight} of a routed expert is stored in {source.method} in blocks of "
                    f"{block[0]}x{block[1]}, which do not divide {partial[0]}; give a checkpoint in bfloat16"
                )
            return
    raise QuantizationError(
        f"{scales} does not fit {weight}: quant_method {source.method!r} has {wanted} (weight_block_size in "
        "config.json is another, or the scales are of another checkpoint)"
    )
