"""Dtype and shape of every packed tensor of a layer, known before any is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout, row_codec, tiled
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.errors import CheckpointError


@dataclass(frozen=True)
class PackedSpec:
    """What fixes dtype and shape of every packed tensor of a layer.

    Attributes:
        shape: of the unquantized layer.
        widths: of the config, in its order.
        basis_bits: 4, 8 or 16.
        basis_group_size: values per basis scale.
        input_bases: 1 for gate and up together (or up alone), 2 for one each.
        payload_words: length of the payload.
        grid: of the rows, see ``row_codec``.
        has_bias: the experts have biases.
        kept: ids of the experts that are stored as they were.
        original_dtype: of biases and kept experts, a name of ``layout.ORIGINAL_DTYPES``.
        stored_rows: rows that are stored; 0 unless the grid is "tiled".
    """

    shape: LayerShape
    widths: tuple[int, ...]
    basis_bits: int
    basis_group_size: int
    input_bases: int
    payload_words: int
    grid: str
    has_bias: bool = False
    kept: tuple[int, ...] = ()
    original_dtype: str = "bfloat16"
    stored_rows: int = 0

    @property
    def is_tiled(self) -> bool:
        """Whether rows are on the grid "tiled"."""
        return self.grid == row_codec.TILED

    @property
    def split_unit(self) -> int:
        """Values of a row that tensor parallelism keeps together."""
        return tiled.TILE if self.is_tiled else BLOCK

    def meaning(self) -> str:
        """What the numbers in the tensors stand for, as far as their dtypes and shapes do not say it."""
        stored = f", experts {list(self.kept)} kept" if self.kept else ""
        dtype = f", {self.original_dtype} originals" if self.kept or self.has_bias else ""
        return f"grid {self.grid}, widths {list(self.widths)}{stored}{dtype}"

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every stored tensor, see ``layout``."""
        e, h, r = self.shape.num_experts, self.shape.hidden_size, self.shape.rank
        f, inputs, dense = len(self.shape.factors), self.shape.inputs, self.basis_bits == 16
        basis = torch.int16 if dense else torch.int32

        def width(columns: int) -> int:
            return columns if dense else -(-columns // BLOCK) * self.basis_bits

        def groups(columns: int) -> int:
            return columns // self.basis_group_size

        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "bitsmoe_row_codes": (torch.uint8, (f, e, r)),
            "bitsmoe_scale_grid": (torch.int16, (0,) if self.is_tiled else (f, 2, r)),
            "bitsmoe_payload": (torch.int32, (self.payload_words,)),
            "bitsmoe_input_basis": (basis, (self.input_bases * r, width(h))),
            "bitsmoe_input_scales": (torch.int16, (0,) if dense else (self.input_bases * r, groups(h))),
            "bitsmoe_output_basis": (basis, (h, width(r))),
            "bitsmoe_output_scales": (torch.int16, (0,) if dense else (h, groups(r))),
        }
        i, original = self.shape.intermediate_size, layout.stored_dtype(self.original_dtype)
        if self.has_bias:
            found |= {
                "bitsmoe_input_bias": (original, (e, inputs, i)),
                "bitsmoe_output_bias": (original, (e, h)),
            }
        if self.kept:
            n = len(self.kept)
            found |= {
                "bitsmoe_kept_input": (original, (n, inputs, i, h)),
                "bitsmoe_kept_output": (original, (n, h, i)),
            }
        if self.is_tiled:
            found |= {
                "bitsmoe_tile_scales": (torch.int16, (self.stored_rows, tiled.tiles(i))),
                "bitsmoe_row_gains": (torch.int16, (self.stored_rows,)),
            }
        return found

    def original(self, stored: Tensor) -> Tensor:
        """A bias or kept expert as it was."""
        return stored.view(layout.ORIGINAL_DTYPES[self.original_dtype])

    def check_rows(self, name: str, row_codes: Tensor) -> None:
        """Refuse row codes ``[f, E, r]`` that do not describe the other tensors.

        Args:
            name: of the layer, for errors.

        Raises:
            CheckpointError: naming what they describe.
        """
        if int(row_codes.max()) // SCALE_LEVELS >= len(self.widths):
            raise CheckpointError(f"{name}.bitsmoe_row_codes holds a width that the config lacks")
        if not layout.experts_without_rows(row_codes, self.widths, self.kept):
            raise CheckpointError(f"{name}: a kept expert has rows; kept_experts in config.json was altered")
        counts = torch.bincount(row_codes.flatten().long() // SCALE_LEVELS, minlength=len(self.widths))
        words = self.shape.blocks * int((counts * torch.tensor(self.widths, device=counts.device)).sum())
        if words != self.payload_words:
            raise CheckpointError(
                f"{name}: row codes describe {words} payload words, the config {self.payload_words}"
            )
        rows = row_codes.numel() - (int(counts[0]) if self.widths[0] == 0 else 0)
        if self.is_tiled and rows != self.stored_rows:
            raise CheckpointError(f"{name}: row codes describe {rows} rows, the config {self.stored_rows}")
