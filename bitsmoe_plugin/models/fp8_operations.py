"""Weights in FP8 that transformers' operation dequantizes if they are handed to it in another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

_SCALE = "_scale_inv"


class FusedDequantize(ConversionOps):
    """Experts' weights in one piece, ``[E, rows, columns]``, and their scales: transformers knows by their
    names only those of single weights."""

    def __init__(self, operation: Any) -> None:
        """
        Args:
            operation: of transformers, for weights with scales per block.
        """
        self.operation = operation
        self.hf_quantizer = operation.hf_quantizer  # transformers asks whether stored dtypes are wanted

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers."""
        (name,) = (key for key in input_dict if not key.endswith(_SCALE))
        scales = input_dict.get(f"{name}{_SCALE}")
        if scales is None:  # this layer is stored unquantized
            return input_dict
        parts = {"weight": input_dict[name], "weight_scale_inv": scales}
        (weight,) = self.operation.convert(parts, *args, **kwargs).values()
        return {name: weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return self.operation.reverse_op  # type: ignore[no-any-return]


class PartialBlocksDequantize(ConversionOps):
    """Weights whose last block of rows or columns is not whole, as in DeepSeek-V3's attention.

    The operation takes the size of a block from the number of scales, which is right only if all blocks are
    whole. So it is given whole ones, and what was added is cut off again.
    """

    def __init__(self, operation: Any, block: tuple[int, int]) -> None:
        """
        Args:
            operation: of transformers, for weights ``[rows, columns]`` with scales per block.
            block: rows and columns of a block.
        """
        self.operation = operation
        self.block = block
        self.hf_quantizer = operation.hf_quantizer  # transformers asks whether stored dtypes are wanted

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers."""
        shapes: dict[str, list[torch.Size]] = {}
        whole = dict(input_dict)
        for key, value in input_dict.items():
            if f"{key}{_SCALE}" in input_dict:
                weights, scales = _listed(value), _listed(input_dict[f"{key}{_SCALE}"])
                if len(weights) == len(scales) and any(map(self._is_partial, weights, scales)):
                    shapes[key] = [weight.shape for weight in weights]
                    whole[key] = [self._filled(weight) for weight in weights]
        out: dict[str, Any] = self.operation.convert(whole, *args, **kwargs)
        if "weight" in shapes:  # one weight, returned under the name of what it becomes
            return {name: _cut(weight, shapes["weight"][0]) for name, weight in out.items()}
        for key, wanted in shapes.items():
            out[key] = [_cut(weight, shape) for weight, shape in zip(out[key], wanted, strict=True)]
        return out

    def _is_partial(self, weight: Tensor, scales: Tensor) -> bool:
        """Whether scales are of such blocks as the last of which is not whole."""
        if weight.dim() < 2 or not weight.is_floating_point():
            return False
        (rows, columns), (height, width) = weight.shape[-2:], self.block
        grid = (-(-rows // height), -(-columns // width))
        return tuple(scales.shape[-2:]) == grid and bool(rows % height or columns % width)

    def _filled(self, weight: Tensor) -> Tensor:
        """A weight with zeros up to the end of its last blocks."""
        (rows, columns), (height, width) = weight.shape[-2:], self.block
        size = (-(-rows // height) * height, -(-columns // width) * width)
        filled = torch.zeros(*weight.shape[:-2], *size, dtype=torch.uint8, device=weight.device)
        filled[..., :rows, :columns] = weight.view(torch.uint8)
        return filled.view(weight.dtype)

    @property
    def reverse_op(self) -> ConversionOps:
        return self.operation.reverse_op  # type: ignore[no-any-return]


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list) else [value]


def _cut(weight: Tensor, shape: torch.Size) -> Tensor:
    return weight[..., : shape[-2], : shape[-1]].contiguous()
