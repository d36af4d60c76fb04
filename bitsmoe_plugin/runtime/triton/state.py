"""What the Triton kernels know of one layer, derived once from its packed tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout, row_codec
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.layout import PackedExperts, RowIndex
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.gating import Gating, GatingForm
from bitsmoe_plugin.runtime.triton.rows import form_constants, pair_tables, row_units


@dataclass(frozen=True)
class LayerState:
    """Device tensors and sizes of the rows of one layer or shard.

    ``order`` and ``places`` cost (4 f - 2) E r bytes (int16; 2.5 MiB for 128 experts and rank 2048), the
    others next to nothing; scales are computed from the stored codes where they are used.

    Attributes:
        payload: ``[words]`` int32, as stored.
        row_codes: ``[f, E, r]`` uint8, as stored.
        scale_grid: ``[f, 2, r]`` float16; empty with the grid "tiled".
        starts: ``[f, E]`` int64, first payload word.
        row_starts: ``[f, E]`` int64, stored rows before.
        counts: ``[f, E, widths]`` int32, stored rows of each width.
        order: ``[f, E, r]`` int16 (int32 from rank 2**15 on), rank indices by falling width.
        places: ``[f - 1, E, r]`` alike, the inverse for the factors that read the hidden states: the place
            of a rank index among the rows.
        tables, half_tables: see ``rows.pair_tables``, of bfloat16 and of float16.
        lifts: ``[f]`` float32, powers of two that bring the largest scale of each factor to about 1/4, so
            that coordinates times scales stay within the range of float16.
        stored_widths: rising, as row codes number them.
        widths: falling, without 0.
        grid: of the rows, see ``row_codec``.
        size: intermediate_size.
        form: of the gating; None: torch computes ``gating`` between the kernels.
        gating: of the experts.
        bias: ``[E, f - 1, I]`` of gate and up, or up, as stored; empty if the experts have none.
        tile_scales, row_gains: float16, as stored; empty unless the grid is "tiled".
    """

    payload: Tensor
    row_codes: Tensor
    scale_grid: Tensor
    starts: Tensor
    row_starts: Tensor
    counts: Tensor
    order: Tensor
    places: Tensor
    tables: Tensor
    half_tables: Tensor
    lifts: Tensor
    stored_widths: tuple[int, ...]
    widths: tuple[int, ...]
    grid: str
    size: int
    form: GatingForm | None
    gating: Gating
    bias: Tensor
    tile_scales: Tensor
    row_gains: Tensor

    @classmethod
    def derive(cls, spec: PackedSpec, packed: PackedExperts, gating: Gating) -> LayerState:
        """From the packed tensors, on their device."""
        device = packed.payload.device
        index = layout.index_rows(packed.row_codes, spec.widths, spec.shape)
        position = torch.int16 if spec.shape.rank < 2**15 else torch.int32
        scale_grid = packed.scale_grid.contiguous().view(torch.float16)
        tile_scales, row_gains = (
            scale_grid.new_empty(0) if tensor is None else tensor.contiguous().view(torch.float16)
            for tensor in (packed.tile_scales, packed.row_gains)
        )
        return cls(
            payload=packed.payload.contiguous(),
            row_codes=packed.row_codes.contiguous(),
            scale_grid=scale_grid,
            starts=torch.tensor(index.starts, dtype=torch.int64, device=device),
            row_starts=torch.tensor(index.row_starts, dtype=torch.int64, device=device),
            counts=torch.tensor(index.counts, dtype=torch.int32, device=device),
            order=index.order.to(position),
            places=index.order[:-1].argsort(-1).to(position),
            tables=pair_tables().to(device),
            half_tables=pair_tables(torch.float16).to(device),
            lifts=_lifts_of_gains(row_gains, index) if spec.is_tiled else _lifts(scale_grid),
            stored_widths=spec.widths,
            widths=index.widths,
            grid=spec.grid,
            size=spec.shape.intermediate_size,
            form=gating if isinstance(gating, GatingForm) else None,
            gating=gating,
            bias=packed.payload.new_empty(0, dtype=torch.float32)
            if packed.input_bias is None
            else spec.original(packed.input_bias).contiguous(),
            tile_scales=tile_scales,
            row_gains=row_gains,
        )

    @property
    def is_tiled(self) -> bool:
        """Whether rows are on the grid "tiled"."""
        return self.grid == row_codec.TILED

    @property
    def experts(self) -> int:
        return self.row_codes.shape[1]

    @property
    def rank(self) -> int:
        return self.row_codes.shape[2]

    @property
    def inputs(self) -> int:
        """Factors that read the hidden states."""
        return self.row_codes.shape[0] - 1

    @property
    def blocks(self) -> int:
        return row_codec.padded(self.size) // BLOCK

    def bases(self, z: Tensor) -> int:
        """Input bases that the coordinates ``[T, n * r]`` stand for."""
        return z.shape[1] // self.rank

    def pointers(self) -> dict[str, Tensor]:
        """The tensors by which kernels find rows."""
        names = ("payload", "starts", "counts", "tile_scales", "row_starts")
        return {name: getattr(self, name) for name in names}

    def scale_pointers(self) -> dict[str, Tensor]:
        """The tensors by which kernels know rank indices and scales of rows, see ``row_scales``."""
        codes = self.row_gains if self.is_tiled else self.row_codes
        return {"order": self.order, "row_codes": codes, "scale_grid": self.scale_grid}

    def tables_for(self, operand: torch.dtype) -> Tensor:
        """Those that kernels look up values of dtype ``operand`` in."""
        return self.half_tables if operand == torch.float16 else self.tables

    def constants(self) -> dict[str, object]:
        """What every kernel over rows is compiled for."""
        return {
            "EXPERTS": self.experts,
            "INPUTS": self.inputs,
            "RANK": self.rank,
            "ROW_BLOCKS": self.blocks,
            "WIDTHS": self.widths,
            "GRID": self.grid,
        }

    @property
    def units(self) -> tuple[float, ...]:
        """``rows.row_units`` of ``widths``."""
        return row_units(self.widths, self.grid)

    @property
    def units_by_code(self) -> tuple[float, ...]:
        """The same of ``stored_widths``, 0 for dropped rows."""
        unit_of = dict(zip(self.widths, self.units, strict=True))
        return tuple(unit_of.get(width, 0.0) for width in self.stored_widths)

    def gating_constants(self) -> dict[str, object]:
        """What every kernel that applies the gating is compiled for; without a form it writes products."""
        form = () if self.form is None else form_constants(self.form)
        return {"FORM": form, "SIZE": self.size, "HAS_BIAS": self.bias.numel() > 0}

    def products(self, like: Tensor, pairs: int) -> Tensor:
        """What such a kernel writes to: hidden units ``[pairs, 32 * blocks]`` in the dtype of ``like``, or
        products ``[pairs, inputs, 32 * blocks]`` float32."""
        if self.form is not None:
            return like.new_empty((pairs, 32 * self.blocks))
        return like.new_empty((pairs, self.inputs, 32 * self.blocks), dtype=torch.float32)

    def gated(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden units of what was written there."""
        if self.form is not None:
            return products
        hidden = self.gating(*products.unbind(1)).to(dtype)
        hidden[:, self.size :] = 0
        return hidden


def _lifts(scale_grid: Tensor) -> Tensor:
    """See ``LayerState.lifts``; ``scale_grid`` ``[f, 2, r]``."""
    low, step = scale_grid.float().unbind(1)
    largest = (low + (SCALE_LEVELS - 1) * step).amax(-1)
    return torch.exp2(-2 - largest.ceil())


def _lifts_of_gains(gains: Tensor, index: RowIndex) -> Tensor:
    """The same of gains ``[rows]`` in the order of the payload; 2**-24 where all are 0."""
    rows = [sum(sum(counts) for counts in factor) for factor in index.counts]
    least = gains.new_full((1,), 2.0**-24)
    largest = [torch.cat([least, part.abs()]).amax() for part in gains.split(rows)]
    return torch.exp2(-2 - torch.stack(largest).float().log2().ceil())
