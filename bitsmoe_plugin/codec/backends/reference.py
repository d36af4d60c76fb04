"""Rounding and packing in plain torch, on any device: what the other backends are measured by."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.codec import bit_strings, row_codec, trellis, uniform
from bitsmoe_plugin.codec.backends.interface import CoupledBlocks, RankRows, RoundingBackend
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.scale_grid import nearby_codes
from bitsmoe_plugin.codec.trellis import coupled_search, search


class ReferenceBackend(RoundingBackend):
    """See ``RoundingBackend``. Others override what they do faster."""

    values_together = 0
    """Values that are rounded at once where no row waits for another, if these are more than a row."""

    def trellis_codes(self, values: Tensor, rows: Tensor, weights: Tensor, bits: int) -> Tensor:
        return search.search_reference(values, rows, weights, bits)

    def coupled_codes(self, values: Tensor, blocks: CoupledBlocks, bits: int) -> Tensor:
        return coupled_search.search_reference(values, blocks, bits)

    def best_scales(self, rows: Tensor, weights: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(bits, int):
            scale, distortions = uniform.best_scale_reference(rows, weights, bits)
            return scale.squeeze(-1), distortions
        scales, distortions = torch.zeros_like(rows[..., 0]), torch.zeros_like(rows[..., 0])
        weights = weights.expand_as(rows)
        for width in torch.unique(bits).tolist():
            pick = bits == width
            scales[pick], distortions[pick] = self.best_scales(rows[pick], weights[pick], width)
        return scales, distortions

    def choose_scales(
        self, rows: Tensor, weights: Tensor, bits: Tensor, start: Tensor, low: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        codes = nearby_codes(rows, weights, bits.long(), start, low, step)
        return codes, torch.exp2(low + codes * step)

    def rounded(
        self, rows: Tensor, scales: Tensor, weights: Tensor, bits: Tensor, grid: str
    ) -> tuple[Tensor, Tensor]:
        size = rows.shape[-1]
        codes = torch.zeros(*rows.shape[:-1], row_codec.padded(size), dtype=torch.int32, device=rows.device)
        weights = weights.expand_as(rows)
        for width in torch.unique(bits).tolist():
            if width == 0:
                continue
            pick = bits == width
            chosen, scale = rows[pick], scales[pick][:, None]
            if row_codec.uses_trellis(width, grid):
                codes[pick] = self._whole_blocks(chosen / scale, weights[pick], width)
            else:
                codes[..., :size][pick] = uniform.encode(chosen, scale, width).to(torch.int32)
        return codes, row_codec.decode(codes, scales, bits, size, grid)

    def _whole_blocks(self, rows: Tensor, weights: Tensor, width: int) -> Tensor:
        """Trellis codes ``[n, padded(I)]`` of rows ``[n, I]`` at scale 1; what is added weighs nothing."""
        fill = (0, row_codec.padded(rows.shape[-1]) - rows.shape[-1])
        rows, weights = torch.nn.functional.pad(rows, fill), torch.nn.functional.pad(weights, fill)
        return self.trellis_codes(trellis.table(width).to(rows.device), rows, weights, width)

    def rounded_coupled(
        self,
        rows: Tensor,
        scales: Tensor,
        weights: Tensor,
        unit: Tensor,
        variance: Tensor,
        bits: Tensor,
        grid: str,
    ) -> tuple[Tensor, Tensor]:
        size = rows.shape[-1]
        codes, _ = self.rounded(rows, scales, weights, bits, grid)
        for width in torch.unique(bits).tolist():
            if not row_codec.uses_trellis(width, grid):
                continue
            pick = bits == width
            chosen = torch.nn.functional.pad(rows[pick] / scales[pick][:, None], (0, BLOCK - size))
            blocks = CoupledBlocks(chosen, pick.nonzero()[:, 0], unit, variance, codes[pick])
            codes[pick] = self.coupled_codes(trellis.table(width).to(rows.device), blocks, width)
        return codes, row_codec.decode(codes, scales, bits, size, grid)

    def round_rank(self, rows: RankRows, first: int, last: int, target: Tensor, grid: str) -> None:
        together = 1
        if rows.unit is None:
            together = max(1, self.values_together // target[:, :, 0].numel())
        weights = rows.weights[:, :, None]
        for k in range(first, last, together):
            some = slice(k, min(k + together, last))
            wanted, bits = target[:, :, some.start - first : some.stop - first], rows.bits[:, :, some]
            low, step = rows.low[:, None, some], rows.step[:, None, some]
            scale_codes, scales = self.choose_scales(wanted, weights, bits, rows.start[:, :, some], low, step)
            codes, values = self.rounded(wanted, scales, weights, bits, grid)
            left = (wanted - values).square_().mul_(weights)
            rows.codes[:, :, some], rows.scale_codes[:, :, some] = codes, scale_codes
            rows.values[:, :, some], rows.errors[:, :, some] = values, left.sum(-1)
            rows.work[:, :, some] -= values
            if rows.unit is not None:
                share = rows.unit[:, :, k, k + 1 : last, None]
                self._add_product(target[:, :, k + 1 - first :], share, rows.work[:, :, some])

    def _add_product(self, total: Tensor, share: Tensor, row: Tensor) -> None:
        """``total += share * row``."""
        total += share * row

    def pack_codes(self, codes: Tensor, bits: int) -> Tensor:
        return bit_strings.pack_codes_reference(codes.to(torch.int64), bits)

    def pack(self, codes: Tensor, bits: Tensor) -> list[Tensor]:
        return [self._pack_expert(*expert).cpu() for expert in zip(codes, bits, strict=True)]

    def _pack_expert(self, codes: Tensor, bits: Tensor) -> Tensor:
        """Words of the rows of codes ``[r, n]`` by falling width."""
        widths = [width for width in torch.unique(bits).flip(0).tolist() if width]
        pieces = [self.pack_codes(codes[bits == width], width).flatten() for width in widths]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int32, device=codes.device)


REFERENCE = ReferenceBackend()
