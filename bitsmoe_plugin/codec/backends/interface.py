"""What every backend computes; ``backend_for`` says which is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class RankRows:
    """Factors that are rounded row after row, and what becomes of them; all contiguous.

    Attributes:
        work: ``[factors, e, r, I]`` float32: rows not yet rounded; of the others, row minus value.
        bits: ``[factors, e, r]`` uint8.
        unit: ``[1 or factors, e, r, r]`` float32, the share of a row's error that each later row makes up
            for; None: none.
        weights: ``[factors, e, I]`` float32.
        start: ``[factors, e, r]`` float32, planned scale codes.
        low, step: ``[factors, r]`` float32, scale grids.
        codes: ``[factors, e, r, padded(I)]`` int32, to be filled, like the following.
        scale_codes: ``[factors, e, r]`` uint8.
        values: ``[factors, e, r, I]`` float32.
        errors: ``[factors, e, r]`` float32, weighted squares of what is left of each row's target.
    """

    work: Tensor
    bits: Tensor
    unit: Tensor | None
    weights: Tensor
    start: Tensor
    low: Tensor
    step: Tensor
    codes: Tensor
    scale_codes: Tensor
    values: Tensor
    errors: Tensor


@dataclass(frozen=True)
class CoupledBlocks:
    """Blocks of one width, to be coded.

    Attributes:
        rows: ``[n, 32]`` float32 at scale 1.
        owner: ``[n]`` int64, whose ``unit`` and ``variance`` each has.
        unit: ``[owners, 32, 32]`` float32, upper triangular, ones on the diagonal.
        variance: ``[owners, 32]`` float32, not negative; 0 where a block is filled up.
        codes: ``[n, 32]`` int32, found before.
    """

    rows: Tensor
    owner: Tensor
    unit: Tensor
    variance: Tensor
    codes: Tensor


class RoundingBackend(Protocol):
    """Rows to codes, and codes to words. Tensors of one call are on one device, and so are its results."""

    def trellis_codes(self, values: Tensor, rows: Tensor, weights: Tensor, bits: int) -> Tensor:
        """Trellis codes of blocks of 32 values, see ``trellis.search.search``.

        Args:
            values: ``[2**WINDOW]`` float32, what each window decodes to.
            rows, weights: ``[n, columns]`` float32, columns a multiple of 32.
            bits: 1 to 4.

        Returns:
            ``[n, columns]`` int32.
        """
        ...

    def coupled_codes(self, values: Tensor, blocks: CoupledBlocks, bits: int) -> Tensor:
        """Trellis codes ``[n, 32]`` int32 of blocks, see ``trellis.coupled_search.search_reference``."""
        ...

    def best_scales(self, rows: Tensor, weights: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor]:
        """Scales and distortions, both ``[...]`` float32, see ``uniform.best_scale``.

        Args:
            rows: ``[..., n]`` float32.
            weights: broadcast against ``rows``.
            bits: one for all, or ``[...]`` int64; 0 drops the row.
        """
        ...

    def choose_scales(
        self, rows: Tensor, weights: Tensor, bits: Tensor, start: Tensor, low: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes uint8 and scales float32, both ``[...]``, see ``scale_grid.nearby_codes``.

        Args:
            rows: ``[..., n]`` float32.
            weights: broadcast against ``rows``.
            bits: ``[...]`` uint8 or int64.
            start: ``[...]`` float32, planned codes.
            low, step: float32, broadcast against ``start``.
        """
        ...

    def rounded(
        self, rows: Tensor, scales: Tensor, weights: Tensor, bits: Tensor, grid: str
    ) -> tuple[Tensor, Tensor]:
        """Codes ``[..., padded(n)]`` int32 and values ``[..., n]`` float32, see ``row_codec.encode``.

        Args:
            rows: ``[..., n]`` float32.
            scales: ``[...]`` float32.
            weights: broadcast against ``rows``.
            bits: ``[...]`` uint8 or int64; 0 gives zeros.
        """
        ...

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
        """As ``rounded``, of rows of one block each; those of a trellis are then coded once more by
        ``coupled_codes``.

        Args:
            rows: ``[e, r, n]`` float32, n at most 32.
            scales, bits: ``[e, r]``.
            weights: ``[e, 1, n]`` float32.
            unit, variance: ``[e, 32, 32]`` and ``[e, 32]``, see ``CoupledBlocks``.
        """
        ...

    def round_rank(self, rows: RankRows, first: int, last: int, target: Tensor, grid: str) -> None:
        """Round rows ``first`` to ``last`` one after another, each passing its error on to those after it.

        Args:
            target: ``[factors, e, last - first, I]`` float32, what the rows shall be; overwritten if there
                is ``rows.unit``.
        """
        ...

    def pack_codes(self, codes: Tensor, bits: int) -> Tensor:
        """Words ``[rows, n / 32 * bits]`` int32 of codes ``[rows, n]``, whole blocks; see ``bit_strings``."""
        ...

    def pack(self, codes: Tensor, bits: Tensor) -> list[Tensor]:
        """Payload words ``[words]`` int32 of each expert's factor, on the CPU; see ``layout.pack_expert``.

        Args:
            codes: ``[experts, r, n]`` int32, whole blocks.
            bits: ``[experts, r]`` int64.
        """
        ...
