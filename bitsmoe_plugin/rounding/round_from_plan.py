"""Rounding a layer as it was planned, without calibrating it again.

For methods in which nothing that is found out after planning changes a layer:
    ``BitsMoEConfig.rounds_as_planned``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.base.devices import computing_on
from bitsmoe_plugin.base.free_memory import release_free_memory
from bitsmoe_plugin.base.scratch import Scratch
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.base.workers import ALONE, Workers
from bitsmoe_plugin.codec.scale_grid import ScaleGrid
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.rounding.feedback_rounding import round_along_rank
from bitsmoe_plugin.rounding.rounded_layer import RoundedExperts, RoundedLayer, merged_experts, pack_layer
from bitsmoe_plugin.rounding.row_scales import model_scales
from bitsmoe_plugin.spectral.bases import BasisInverses, SharedBases, all_factors
from bitsmoe_plugin.spectral.error_feedback import Feedback
from bitsmoe_plugin.spectral.layer_problem import expert_groups
from bitsmoe_plugin.spectral.row_weights import RowWeights

CPU = torch.device("cpu")


def round_as_planned(
    weights: ExpertWeights,
    row_bits: Tensor,
    bases: SharedBases,
    energies: Tensor,
    known: RowWeights,
    config: BitsMoEConfig,
    workers: Workers = ALONE,
    device: torch.device = CPU,
) -> RoundedLayer:
    """``layer_rounding.round_layer`` from what the plan tells.

    Args:
        row_bits: ``[f, E, r]`` int64.
        bases, energies, known: of the plan.
        workers: share the work; all must call this with the same arguments, and get the same.
        device: where to compute; the arguments may be elsewhere.

    Returns:
        the layer, on the CPU.
    """
    shape = weights.shape
    with computing_on(device):
        weights, row_bits, bases = weights.to(device), row_bits.to(device), bases.to(device)
        inverses, known = BasisInverses.of(bases), known.to(device)
        inner, outer = known.of(slice(None), bases.output_basis.dequantize())
        scales = _scales(energies.to(device), inner, outer, row_bits, config)
        grid = ScaleGrid.covering(scales, row_bits > 0)
        # What rows of down cost besides is added for the layer as a whole.
        own = torch.stack([*known.rank.expand(shape.inputs, -1, -1), torch.ones_like(known.rank[0])])
        groups = enumerate(expert_groups(shape.num_experts, shape.rank**2, device))
        done, scratch = {}, Scratch()
        for i, part in ((i, part) for i, part in groups if workers.takes(i)):
            factors = all_factors(weights, inverses, part, scratch=scratch)
            feedback, bits = Feedback(None, own[:, part]), row_bits[:, part]
            with span("rounding"):
                rows = round_along_rank(
                    *(factors, bits, feedback, inner[:, part], grid, scales[:, part], config.grid),
                    in_place=True,
                    scratch=scratch,
                )
            done[i] = RoundedExperts.of(rows, bits, with_values=False)
            del factors, rows
        del scratch
        release_free_memory()  # not of each group: the next one takes what it left
        rounded = merged_experts(done, workers, device)
        return pack_layer(rounded, grid, bases, row_bits, config.widths)


def _scales(energies: Tensor, inner: Tensor, outer: Tensor, bits: Tensor, config: BitsMoEConfig) -> Tensor:
    """Scales ``[f, E, r]`` of Gaussian rows of these energies ``[f, E, r]``."""
    variances = energies / (outer * inner.sum(-1, keepdim=True)).clamp_min(1e-30)
    size = inner.shape[-1]
    return torch.stack(
        [
            model_scales(variance, widths, config.grid, size, config.widening and factor < len(bits) - 1)
            for factor, (variance, widths) in enumerate(zip(variances, bits, strict=True))
        ]
    )
