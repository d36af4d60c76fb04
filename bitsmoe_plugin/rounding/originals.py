"""What a packed layer stores as it was: biases, and experts that keep their weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights


def with_originals(
    packed: PackedExperts,
    weights: ExpertWeights,
    biases: ExpertBiases | None,
    kept: tuple[int, ...],
    dtype: torch.dtype,
) -> PackedExperts:
    """The packed layer, on the CPU, with what is stored of it as it was: biases, and the experts ``kept``.

    Args:
        dtype: in which they are stored, see ``layout.original_dtype``.
    """
    found = {}
    if biases is not None:
        found = {"input_bias": torch.stack(biases.inputs, 1), "output_bias": biases.down}
    if kept:
        ids = list(kept)
        found["kept_input"] = torch.stack([matrix[ids] for matrix in weights.inputs], 1)
        found["kept_output"] = weights.down[ids]
    stored = {name: layout.store_bits(tensor.to(dtype)).cpu() for name, tensor in found.items()}
    return replace(packed, **stored)
