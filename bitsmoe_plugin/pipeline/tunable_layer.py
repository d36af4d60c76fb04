"""A packed layer whose scales and codes can be learnt: they enter its computation as they will be stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bitsmoe_plugin.base.devices import multiplies_bfloat16
from bitsmoe_plugin.codec.layout import PackedExperts, row_widths
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.pipeline.tunable_codes import TunableCodes
from bitsmoe_plugin.runtime.dispatch import Runtime, prepare
from bitsmoe_plugin.runtime.experts import BitsMoEExperts
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer
from bitsmoe_plugin.runtime.with_originals import WithOriginals

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST_STEP = 1e-3
"""Octaves; in rows whose scales are all alike there is nothing to choose from."""


class TunableLayer:
    """A packed layer whose scales are multiplied with exp(gain); see ``dispatch.Runtime``.

    Gains are float32 and start at 0. What they make of a scale is rounded as it is stored, and gradients pass
    through the rounding as if it were none, so what is learnt from is what will be loaded. What the layer
    computes is computed again in the backward pass, so that the decoded rows of only one layer are in memory.
    Products of hidden states in bfloat16 are in bfloat16, too, where the device has instructions for them.

    Attributes:
        bases: of the scales of input and output basis, in their shapes.
        rows: of the rows, ``[f, E, r]``. A scale code moves for more than half a step of its grid.
        codes: of the rows, None if they are not learnt.
    """

    def __init__(self, module: BitsMoEExperts, learn: tuple[str, ...] = ("bases", "rows")) -> None:
        """
        Args:
            learn: what gets gradients, see ``TuningSettings``.
        """
        self._layer = ReferenceLayer.prepare(module.spec, module.packed(), module.gating)
        packed = self.packed
        self._scales = packed.input_scales, packed.output_scales
        self.bases = tuple(self._gain(scales.shape, "bases" in learn) for scales in self._scales)
        self.rows = self._gain(packed.row_codes.shape, "rows" in learn)
        self.codes = TunableCodes(self._layer) if "codes" in learn else None
        self._used = row_widths(packed.row_codes, module.spec.widths) > 0

    def _gain(self, shape: Any, learnt: bool) -> Tensor:
        device = self.packed.payload.device
        return torch.zeros(shape, dtype=torch.float32, device=device, requires_grad=learnt)

    @property
    def gains(self) -> list[Tensor]:
        """Those that are learnt."""
        return self.scale_gains + self.code_gains

    @property
    def scale_gains(self) -> list[Tensor]:
        """Those of scales that are learnt."""
        return [gain for gain in (*self.bases, self.rows) if gain.requires_grad]

    @property
    def code_gains(self) -> list[Tensor]:
        """Those of codes, if they are learnt."""
        return [] if self.codes is None else [self.codes.gain]

    @property
    def packed(self) -> PackedExperts:
        """The tensors that it computes from."""
        return self._layer.packed

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Differentiable in the gains, too."""
        inputs = hidden, top_k_index, top_k_weights, *self.bases, self.rows, *self.code_gains
        return checkpoint(self._compute, *inputs, use_reentrant=False)  # type: ignore[no-any-return]

    def _compute(self, hidden: Tensor, index: Tensor, weights: Tensor, *gains: Tensor) -> Tensor:
        *of_bases, of_rows = gains[:3]
        rows = None if self.codes is None else self.codes.rows(gains[3])
        given, out = (
            _scaled(basis, scales, gain)
            for basis, scales, gain in zip(self._layer.bases(), self._scales, of_bases, strict=True)
        )
        narrow = hidden.dtype == torch.bfloat16 and multiplies_bfloat16(hidden.device)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=narrow):
            return self._layer.compute(hidden, index, weights, given, out, self._row_gains(of_rows), rows)

    def _row_gains(self, gains: Tensor) -> Tensor:
        """Scale of every row over the one that is stored, ``[f, E, r]``."""
        codes = self._stored_codes()
        return torch.exp2((self._codes(gains) - codes) * self._steps())

    def _codes(self, gains: Tensor) -> Tensor:
        """Scale codes ``[f, E, r]`` float32, whole numbers; gradients as if they were not rounded."""
        stored = self._stored_codes()
        place = stored + gains / (math.log(2) * self._steps().clamp_min(_SMALLEST_STEP))
        codes = torch.where(self._used, place.round().clamp(0, SCALE_LEVELS - 1), stored)
        return place + (codes - place).detach()

    def _stored_codes(self) -> Tensor:
        return (self.packed.row_codes % SCALE_LEVELS).float()

    def _steps(self) -> Tensor:
        """Octaves between codes, ``[f, 1, r]`` float32."""
        return self.packed.scale_grid.view(torch.float16)[:, 1:].float()

    @torch.no_grad()
    def tuned(self) -> PackedExperts:
        """The packed tensors with the gains in them."""
        packed = self.packed
        read, write = (
            _with_gain(scales, gain).half().view(torch.int16)
            for scales, gain in zip(self._scales, self.bases, strict=True)
        )
        widths = packed.row_codes - packed.row_codes % SCALE_LEVELS
        codes = widths + self._codes(self.rows).round().to(torch.uint8)
        payload = packed.payload if self.codes is None else self.codes.payload().to(packed.payload.device)
        return replace(packed, input_scales=read, output_scales=write, row_codes=codes, payload=payload)


@dataclass(frozen=True)
class Served:
    """What is learnt so far as it will be served: by the fastest runtime; see ``dispatch.Runtime``.

    Attributes:
        packed: of the module that it computes, which it takes the place of.
    """

    packed: PackedExperts
    runtime: Runtime

    @classmethod
    def of(cls, layer: TunableLayer, module: BitsMoEExperts) -> Served:
        """Of a layer that learns for a module."""
        return cls(layer.packed, prepare(module.spec, layer.tuned(), module.gating))

    @torch.no_grad()
    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``dispatch.Runtime``."""
        return self.runtime.forward(hidden, top_k_index, top_k_weights)


class DifferentiableOriginals(WithOriginals):
    """Whose forward pass keeps what its gradients need."""

    forward = WithOriginals.compute


def _with_gain(scales: Tensor, gain: Tensor) -> Tensor:
    """Stored scales, int16, times exp(gain), in float32 rounded to float16; gradients as if they were not."""
    values = (scales.view(torch.float16).float() * gain.exp()).clamp(-_LARGEST, _LARGEST)
    return values + (values.half().float() - values).detach()


def _scaled(basis: Tensor, scales: Tensor, gain: Tensor) -> Tensor:
    """A basis ``[rows, columns]`` float32 with its scales changed; 16-bit bases have none."""
    if not gain.numel():
        return basis
    before = scales.view(torch.float16).float()
    factor = _with_gain(scales, gain) / torch.where(before == 0, 1, before)
    return (basis.view(*gain.shape, -1) * factor[..., None]).flatten(1)
