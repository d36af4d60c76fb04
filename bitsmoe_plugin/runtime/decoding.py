"""The dense weights that a packed layer stands for: what its forward pass computes, as matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights


@torch.no_grad()
def decode_weights(spec: PackedSpec, packed: PackedExperts, dtype: torch.dtype) -> ExpertWeights:
    """Gate and up, or up, ``[E, I, H]``, down ``[E, H, I]`` of a layer or shard, on the device of ``packed``.

    gate[e] = sum over k of (row k of gate) x (row k of the input basis), up alike; down[e] = output basis x
    rows of down. Computed in float32, one expert at a time.

    Args:
        dtype: of the result; experts that are kept as they were are converted too.
    """
    shape, device = spec.shape, packed.payload.device
    experts, size, hidden = shape.num_experts, shape.intermediate_size, shape.hidden_size
    read, (*input_bases, output_basis) = _row_reader(spec, packed), _bases(spec, packed)
    inputs = [torch.empty(experts, size, hidden, dtype=dtype, device=device) for _ in range(shape.inputs)]
    down = torch.empty(experts, hidden, size, dtype=dtype, device=device)
    for expert in range(experts):
        for factor, (weight, basis) in enumerate(zip(inputs, input_bases, strict=True)):
            rows, order = read(factor, expert)
            weight[expert] = rows.T @ basis[order]
        rows, order = read(shape.inputs, expert)
        down[expert] = output_basis[:, order] @ rows
    weights = ExpertWeights.of(inputs, down)
    _copy_kept(spec, packed, weights)
    return weights


def decode_biases(spec: PackedSpec, packed: PackedExperts, dtype: torch.dtype) -> ExpertBiases | None:
    """Biases of a layer, gate (if there is one) and up ``[E, I]``, down ``[E, H]``; None if it has none."""
    if packed.input_bias is None or packed.output_bias is None:
        return None
    inputs = spec.original(packed.input_bias).to(dtype).unbind(1)
    return ExpertBiases.of(inputs, spec.original(packed.output_bias).to(dtype))


def _row_reader(spec: PackedSpec, packed: PackedExperts) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """(factor, expert) -> rows ``[n, I]`` float32 and their rank indices ``[n]``."""
    index = layout.index_rows(packed.row_codes, spec.widths, spec.shape)
    size = spec.shape.intermediate_size
    if spec.is_tiled:
        return lambda factor, expert: layout.unpack_tiled_rows(packed, index, factor, expert, size)
    scales = layout.row_scales(packed.row_codes, packed.scale_grid)
    return lambda factor, expert: layout.unpack_rows(
        packed.payload, index, scales, factor, expert, size, spec.grid
    )


def _bases(spec: PackedSpec, packed: PackedExperts) -> tuple[Tensor, ...]:
    """Of gate, if there is one, and of up ``[r, H]``, which may be one, and of down ``[H, r]``, float32."""
    stored = (packed.input_basis, packed.input_scales), (packed.output_basis, packed.output_scales)
    columns = spec.shape.hidden_size
    read, write = (layout.unpack_basis(*each, spec.basis_bits, columns, spec.grid) for each in stored)
    bases = read.unflatten(0, (spec.input_bases, -1))
    return *(bases[-factor] for factor in range(spec.shape.inputs)), write


def _copy_kept(spec: PackedSpec, packed: PackedExperts, weights: ExpertWeights) -> None:
    """Experts that are stored as they were have no rows."""
    if packed.kept_input is None or packed.kept_output is None:
        return
    kept, dtype = list(spec.kept), weights.down.dtype
    for weight, stored in zip(weights.inputs, spec.original(packed.kept_input).unbind(1), strict=True):
        weight[kept] = stored.to(dtype)
    weights.down[kept] = spec.original(packed.kept_output).to(dtype)
