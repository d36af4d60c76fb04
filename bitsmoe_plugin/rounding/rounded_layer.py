"""Experts after rounding, and a layer of them as it is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.scale_grid import ScaleGrid
from bitsmoe_plugin.rounding import feedback_rounding
from bitsmoe_plugin.spectral.bases import SharedBases


@dataclass(frozen=True)
class RoundedExperts:
    """Some experts after rounding; the first axis is that of the f factors.

    Attributes:
        words: payload of each ``[f][e]``, on the CPU.
        scale_codes: ``[f, e, r]`` uint8.
        errors: ``[f, e, r]`` float32, see ``feedback_rounding.RoundedRows``.
        values: ``[f, e, r, I]`` float32, what is stored; None unless asked for.
    """

    words: list[list[Tensor]]
    scale_codes: Tensor
    errors: Tensor
    values: Tensor | None

    @staticmethod
    @span("packing")
    def of(rows: feedback_rounding.RoundedRows, bits: Tensor, with_values: bool) -> RoundedExperts:
        """Packed rows of some factors ``[factors, e, r, ...]`` at ``bits`` alike."""
        words = [layout.pack_experts(codes, width) for codes, width in zip(rows.codes, bits, strict=True)]
        return RoundedExperts(words, rows.scale_codes, rows.errors, rows.values if with_values else None)

    def to(self, device: torch.device | str) -> RoundedExperts:
        """The same on a device, but for the words."""
        values = None if self.values is None else self.values.to(device)
        return RoundedExperts(self.words, self.scale_codes.to(device), self.errors.to(device), values)

    @staticmethod
    def of_all_factors(rank: RoundedExperts, down: RoundedExperts) -> RoundedExperts:
        """Gate and up, and down, as one."""
        return RoundedExperts(rank.words + down.words, *_joined([rank, down], 0))

    @staticmethod
    def of_all_experts(groups: list[RoundedExperts]) -> RoundedExperts:
        """One group of experts after the other."""
        factors = range(len(groups[0].words))
        words = [[word for group in groups for word in group.words[factor]] for factor in factors]
        return RoundedExperts(words, *_joined(groups, 1))


def _joined(parts: list[RoundedExperts], dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
    values = [part.values for part in parts if part.values is not None]
    return (
        torch.cat([part.scale_codes for part in parts], dim),
        torch.cat([part.errors for part in parts], dim),
        torch.cat(values, dim) if values else None,
    )


def merged_experts(
    groups: dict[int, RoundedExperts], workers: Workers, device: torch.device
) -> RoundedExperts:
    """All experts, from the groups that this one of the workers has rounded."""
    if workers.size > 1:
        groups = workers.merged({i: part.to("cpu") for i, part in groups.items()})
    return RoundedExperts.of_all_experts(list(groups.values())).to(device)


@dataclass(frozen=True)
class RoundedLayer:
    """Attributes:
    packed: the layer as it is stored.
    errors: ``[f, E]`` first-order output error of each factor of each expert.
    """

    packed: PackedExperts
    errors: Tensor


@span("packing")
def pack_layer(
    rounded: RoundedExperts, grid: ScaleGrid, bases: SharedBases, row_bits: Tensor, widths: tuple[int, ...]
) -> RoundedLayer:
    """A layer of which all experts ``[f, E]`` are rounded, as it is stored: on the CPU."""
    input_basis, input_scales = layout.pack_basis(bases.input_basis)
    output_basis, output_scales = layout.pack_basis(bases.output_basis)
    packed = PackedExperts(
        row_codes=layout.pack_row_codes(row_bits, rounded.scale_codes, widths),
        scale_grid=layout.pack_scale_grid(grid),
        payload=torch.cat([words for factor in rounded.words for words in factor]),
        input_basis=input_basis,
        input_scales=input_scales,
        output_basis=output_basis,
        output_scales=output_scales,
    )
    errors = rounded.errors.sum(2)
    errors[-1] = rounded.errors[-1] @ bases.output_basis.dequantize().square().sum(0)
    return RoundedLayer(packed.cpu(), errors.cpu())
