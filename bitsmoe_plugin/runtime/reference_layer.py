"""Reference forward pass of packed experts: pure torch, float32, one expert at a time.

z = input_basis x (one basis for gate and up, or one each)
h = gating(sum_k z_k gate_k, sum_k z_k up_k), or gating(sum_k z_k up_k) of experts without a gate
c = sum over the token's experts of p * (down h)
y = output_basis c
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.gating import Gating

RowReader = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""(factor, expert) -> rows ``[n, I]`` float32 and their rank indices ``[n]`` int64; None: all in order."""
StoredRowReader = Callable[[int, int], tuple[Tensor, Tensor]]
"""``RowReader`` of rows as they are stored."""


def moe_forward(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    experts: int,
    rows_of: RowReader,
    input_basis: Tensor,
    output_basis: Tensor,
    gating: Gating,
    inputs: int = 2,
    input_bias: Tensor | None = None,
) -> Tensor:
    """Output of the routed experts.

    Args:
        hidden: ``[T, H]``.
        top_k_index: ``[T, k]`` int64; ids outside 0..experts-1 are skipped.
        top_k_weights: ``[T, k]``.
        input_basis: ``[r, H]`` float32, or ``[2 r, H]``: gate's above up's.
        output_basis: ``[H, r]`` float32.
        inputs: factors that read the hidden states: 2, gate and up, or 1, up.
        input_bias: ``[E, inputs, I]``.

    Returns:
        ``[T, H]`` in the dtype of ``hidden``; computed in float32.
    """
    z = (hidden.float() @ input_basis.T).unflatten(-1, (-1, output_basis.shape[1]))
    coordinates = torch.zeros_like(z[:, 0], dtype=torch.float32)
    for expert in torch.unique(top_k_index).tolist():
        if not 0 <= expert < experts:
            continue
        token, slot = torch.where(top_k_index == expert)
        selected = z.index_select(0, token)  # its gradients are added up much faster than those of indexing
        products = []
        for factor in range(inputs):
            rows, order = rows_of(factor, expert)
            own = selected[:, -factor]
            products.append((own if order is None else own[:, order]) @ rows)
            if input_bias is not None:
                products[factor] = products[factor] + input_bias[expert, factor].float()
        rows, order = rows_of(inputs, expert)
        out = gating(*products) @ rows.T * top_k_weights[token, slot, None].float()
        coordinates.index_add_(0, token, _in_order(out, order, z.shape[-1]))
    return (coordinates @ output_basis.T).to(hidden.dtype)


@dataclass(frozen=True)
class ReferenceLayer:
    """A packed layer or shard, ready to compute. Holds nothing else: the order of rows and their scales
    are derived at each call for the experts that the call's tokens chose.

    Attributes:
        spec: sizes.
        packed: the tensors.
        starts: ``[f][E]`` first payload word of every (factor, expert).
        row_starts: ``[f][E]`` stored rows before those of every (factor, expert).
        gating: of the experts.
    """

    spec: PackedSpec
    packed: PackedExperts
    starts: list[list[int]]
    row_starts: list[list[int]]
    gating: Gating

    @classmethod
    def prepare(cls, spec: PackedSpec, packed: PackedExperts, gating: Gating) -> ReferenceLayer:
        """Derive the offsets from the row codes."""
        index = layout.index_rows(packed.row_codes.cpu(), spec.widths, spec.shape)
        return cls(spec, packed, index.starts, index.row_starts, gating)

    @torch.no_grad()
    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``dispatch.Runtime``."""
        return self.compute(hidden, top_k_index, top_k_weights, *self.bases())

    def compute(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        input_basis: Tensor,
        output_basis: Tensor,
        row_gains: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """``forward`` with these bases, see ``moe_forward``; differentiable in all but the indices.

        Args:
            row_gains: ``[f, E, r]`` float32, which rows are multiplied with.
            rows: ``[f, E, r, I]`` float32 at scale 1, instead of those that are stored.
        """
        used = [e for e in torch.unique(top_k_index).tolist() if 0 <= e < self.spec.shape.num_experts]
        if not used:
            return torch.zeros_like(hidden)
        bias = self.packed.input_bias
        gains = None if row_gains is None else row_gains[:, used]
        return moe_forward(
            hidden,
            _positions(used, top_k_index),
            top_k_weights,
            experts=len(used),
            rows_of=self._stored(used, gains) if rows is None else self._given(rows, used, gains),
            input_basis=input_basis,
            output_basis=output_basis,
            gating=self.gating,
            inputs=self.spec.shape.inputs,
            input_bias=None if bias is None else self.spec.original(bias)[used],
        )

    def bases(self) -> tuple[Tensor, Tensor]:
        """Input and output basis, float32, see ``moe_forward``."""
        packed = self.packed
        return (
            self._basis(packed.input_basis, packed.input_scales),
            self._basis(packed.output_basis, packed.output_scales),
        )

    def rows_of(self, used: list[int]) -> StoredRowReader:
        """Reads rows by the position of their expert in ``used``."""
        spec, packed = self.spec, self.packed
        row_codes, size = packed.row_codes[:, used], spec.shape.intermediate_size
        shape = replace(spec.shape, num_experts=len(used))
        starts, row_starts = (
            [[places[e] for e in used] for places in factors] for factors in (self.starts, self.row_starts)
        )
        index = replace(
            layout.index_rows(row_codes, spec.widths, shape), starts=starts, row_starts=row_starts
        )
        if spec.is_tiled:
            return lambda factor, expert: layout.unpack_tiled_rows(packed, index, factor, expert, size)
        scales = layout.row_scales(row_codes, packed.scale_grid)
        return lambda factor, expert: layout.unpack_rows(
            packed.payload, index, scales, factor, expert, size, spec.grid
        )

    def _stored(self, used: list[int], gains: Tensor | None) -> RowReader:
        """Reads rows multiplied with their gains ``[f, used, r]``, if there are some."""
        rows_of = self.rows_of(used)
        if gains is None:
            return rows_of

        def read(factor: int, expert: int) -> tuple[Tensor, Tensor]:
            rows, order = rows_of(factor, expert)
            return rows * gains[factor, expert, order, None], order

        return read

    def _given(self, rows: Tensor, used: list[int], gains: Tensor | None) -> RowReader:
        """Reads ``rows`` ``[f, E, r, I]`` at scale 1, with the scales that are stored times their gains
        ``[f, used, r]``, if there are some."""
        scales = layout.row_scales(self.packed.row_codes[:, used], self.packed.scale_grid)
        scales = scales if gains is None else scales * gains
        # Each index would have gradients of the size of all rows.
        each = [factor.unbind() for factor in rows.unbind()]
        return lambda factor, expert: (each[factor][used[expert]] * scales[factor, expert, :, None], None)

    def _basis(self, words: Tensor, scales: Tensor) -> Tensor:
        spec = self.spec
        return layout.unpack_basis(words, scales, spec.basis_bits, spec.shape.hidden_size, spec.grid)


def _in_order(values: Tensor, order: Tensor | None, rank: int) -> Tensor:
    """Values ``[n, rows]`` of the rows at ``order``, at their places in ``[n, rank]``."""
    if order is None:
        return values
    result = values.new_zeros(len(values), rank)
    result[:, order] = values
    return result


def _positions(used: list[int], index: Tensor) -> Tensor:
    """``index`` with each id replaced by its position in ``used`` (rising), -1 if it is not there."""
    ids = torch.tensor(used, device=index.device)
    position = torch.searchsorted(ids, index.long().contiguous()).clamp_max(len(used) - 1)
    return torch.where(ids[position] == index, position, -1)
