"""Rounding a layer as it was planned, without calibrating it again.

For methods in which nothing that is found out after planning changes a layer: ``layer.rounds_as_planned``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin import spectral
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.layer import LayerPlan, RoundedExperts, RoundedLayer, RowWeights, pack_layer
from bitsmoe_plugin.memory import release_free_memory
from bitsmoe_plugin.packing import LayerShape
from bitsmoe_plugin.problem import expert_groups
from bitsmoe_plugin.rounding import Feedback, ScaleGrid, model_scales, round_along_rank
from bitsmoe_plugin.spectral import BasisInverses, ExpertWeights
from bitsmoe_plugin.workers import ALONE, Workers


def round_as_planned(
    weights: ExpertWeights,
    row_bits: Tensor,
    plan: LayerPlan,
    known: RowWeights,
    config: BitsMoEConfig,
    workers: Workers = ALONE,
) -> RoundedLayer:
    """``layer.round_layer`` from what the plan tells.

    Args:
        row_bits: ``[3, E, r]`` int64.
        known: of the plan.
        workers: share the work; all must call this with the same arguments, and get the same.
    """
    shape = LayerShape(weights.num_experts, weights.hidden_size, weights.intermediate_size)
    output_basis, inverses = plan.bases.output_basis.dequantize(), BasisInverses.of(plan.bases)
    inner, outer = known.of(slice(None), output_basis)
    scales = _scales(plan.energies, inner, outer, row_bits, config)
    grid = ScaleGrid.covering(scales, row_bits > 0)
    # What rows of down cost besides is added for the layer as a whole.
    own = torch.stack([*known.rank.expand(2, -1, -1), torch.ones_like(known.rank[0])])
    done = {}
    for i, part in enumerate(expert_groups(shape.num_experts, shape.rank**2)):
        if not workers.takes(i):
            continue
        factors = torch.cat(
            [
                spectral.input_factors(weights, inverses, part),
                spectral.down_factors(weights, inverses, part)[None],
            ]
        )
        feedback, bits = Feedback(None, own[:, part]), row_bits[:, part]
        rows = round_along_rank(
            factors, bits, feedback, inner[:, part], grid, scales[:, part], config.grid, in_place=True
        )
        done[i] = RoundedExperts.of(rows, bits, config.widths, with_values=False)
        release_free_memory()
    everyone = RoundedExperts.of_all_experts(list(workers.merged(done).values()))
    return pack_layer(everyone, grid, plan.bases, row_bits, config.widths)


def _scales(energies: Tensor, inner: Tensor, outer: Tensor, bits: Tensor, config: BitsMoEConfig) -> Tensor:
    """Scales ``[3, E, r]`` of Gaussian rows of these energies ``[3, E, r]``."""
    variances = energies / (outer * inner.sum(-1, keepdim=True)).clamp_min(1e-30)
    size = inner.shape[-1]
    return torch.stack(
        [
            model_scales(variance, widths, config.grid, size, config.widening and factor < 2)
            for factor, (variance, widths) in enumerate(zip(variances, bits, strict=True))
        ]
    )
