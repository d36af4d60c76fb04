"""Codes of a packed layer's rows that can be learnt: values move, and are coded again where they moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitsmoe_plugin.codec import layout, row_codec
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer


class TunableCodes:
    """Rows in units of their scales, each value what its code stands for plus a gain, coded again.

    What is computed with is what the codes stand for; gradients pass through the coding as if it were none
    (the straight-through estimator of arXiv 1308.3432, here through a search for trellis codes). A block of
    32 values keeps its stored codes unless others come closer to where its values are: codes follow from
    gains alone, and are the stored ones where these are 0.

    Attributes:
        gain: ``[f, E, r, I]`` float32. All that is kept takes 20 bytes per weight, gradients and descent 20.
    """

    def __init__(self, layer: ReferenceLayer) -> None:
        spec, packed = layer.spec, layer.packed
        self._bits = layout.row_widths(packed.row_codes, spec.widths)
        self._size, self._grid = spec.shape.intermediate_size, spec.grid
        stored = torch.zeros(
            *self._bits.shape, row_codec.padded(self._size), dtype=torch.int32, device=packed.payload.device
        )
        index = layout.index_rows(packed.row_codes.cpu(), spec.widths, spec.shape)
        for factor in range(self._bits.shape[0]):
            for expert in range(self._bits.shape[1]):
                codes, order = layout.unpack_row_codes(packed.payload, index, factor, expert, self._size)
                stored[factor, expert, order.to(stored.device)] = codes
        self._stored, self._before = stored, self._decoded(stored)
        self._now, self._coded = (stored, self._before), 0
        self.gain = torch.zeros_like(self._before, requires_grad=True)

    def rows(self, gain: Tensor) -> Tensor:
        """``[f, E, r, I]`` at scale 1; differentiable.

        Args:
            gain: the attribute, or what stands for it where a backward pass computes again.
        """
        return _AsCoded.apply(gain, self._found()[1], self._bits[..., None] > 0)  # type: ignore[no-any-return]

    @torch.no_grad()
    def payload(self) -> Tensor:
        """Words ``[words]`` int32 of all rows, on the CPU."""
        codes = self._found()[0]
        parts = [layout.pack_experts(*given) for given in zip(codes, self._bits, strict=True)]
        return torch.cat([words.cpu() for factor in parts for words in factor])

    def _found(self) -> tuple[Tensor, Tensor]:
        """See ``_coded_again``; searched for once after each change of the gains."""
        if self._coded != self.gain._version:
            self._now, self._coded = self._coded_again(), self.gain._version
        return self._now

    @torch.no_grad()
    def _coded_again(self) -> tuple[Tensor, Tensor]:
        """Codes ``[f, E, r, padded(I)]`` int32, and the values that they stand for."""
        codes, values = self._stored.clone(), self._before.clone()
        alike = torch.ones(self._size, device=values.device)
        for factor, bits in enumerate(self._bits):  # one after the other: less is held at once
            place = self._before[factor] + self.gain[factor]
            found, value = row_codec.rounded(
                place, torch.ones_like(bits, dtype=torch.float32), alike, bits, self._grid
            )
            closer = _of_blocks(place - value) < _of_blocks(place - self._before[factor])
            every = closer.repeat_interleave(BLOCK, -1)
            codes[factor] = torch.where(every, found, codes[factor])
            values[factor] = torch.where(every[..., : self._size], value, values[factor])
        return codes, values

    def _decoded(self, codes: Tensor) -> Tensor:
        scales = torch.ones(self._bits.shape, device=codes.device)
        return row_codec.decode(codes, scales, self._bits, self._size, self._grid)


class _AsCoded(torch.autograd.Function):
    """Values of codes, whose gradients are those of the gains that they were found for, where rows are used.
    (Written out: as a sum of gains and differences it goes over all values four times more.)"""

    @staticmethod
    def forward(ctx: Any, gain: Tensor, values: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(used)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (used,) = ctx.saved_tensors
        return gradient * used, None, None


def _of_blocks(errors: Tensor) -> Tensor:
    """Squares ``[..., blocks]`` of errors ``[..., I]``."""
    return pad(errors, (0, -errors.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).square().sum(-1)
