"""Everything that is known about one layer when its experts are quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin import rounding, spectral, statistics
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.packing import LayerShape
from bitsmoe_plugin.spectral import ExpertWeights, SharedBases
from bitsmoe_plugin.statistics import ExpertRows, Gating, LayerActivations, LayerStatistics

_WORKING_SET = 2**26
"""Experts are treated in groups whose covariances hold about this many values (256 MiB)."""
_SECOND_MOMENT_SHRINKAGE = 1e-3


@dataclass(frozen=True)
class LayerProblem:
    """Everything known about one layer: its weights, calibration, bases and factors.

    Attributes:
        factors: ``[3, E, r, I]`` float32, exact in the quantized bases.
        input_basis: ``[r, H]`` float32, dequantized.
        output_basis: ``[H, r]`` float32, dequantized.
    """

    name: str
    weights: ExpertWeights
    activations: LayerActivations
    rows: list[ExpertRows]
    gating: Gating
    statistics: LayerStatistics
    bases: SharedBases
    factors: Tensor
    input_basis: Tensor
    output_basis: Tensor
    config: BitsMoEConfig

    @property
    def shape(self) -> LayerShape:
        w = self.weights
        return LayerShape(w.num_experts, w.hidden_size, w.intermediate_size)

    def chunks(self, experts: int) -> list[slice]:
        """Positions 0..experts in groups of bounded working set."""
        size = max(1, _WORKING_SET // (2 * self.shape.rank**2))
        return [slice(start, min(start + size, experts)) for start in range(0, experts, size)]


def shared_bases(stats: LayerStatistics, config: BitsMoEConfig) -> SharedBases:
    """Bases of a layer, quantized as the config says."""
    identity = torch.eye(stats.gram.shape[0], dtype=torch.float64, device=stats.gram.device)
    metric = spectral.shrink(stats.second_moment, _SECOND_MOMENT_SHRINKAGE)
    given = spectral.input_basis(stats.gram, metric if config.whitening else identity)
    out = spectral.output_basis(stats.output_moment)
    return SharedBases(
        spectral.quantize_basis(given, config.basis_bits, config.basis_group_size),
        spectral.quantize_basis(out, config.basis_bits, config.basis_group_size),
    )


def build_problem(
    name: str,
    weights: ExpertWeights,
    activations: LayerActivations,
    gating: Gating,
    config: BitsMoEConfig,
    bases: SharedBases | None = None,
) -> LayerProblem:
    """Collect the statistics and factors of one layer; ``bases`` are computed if not given.

    Raises:
        QuantizationError: NaN or infinity in weights or activations.
    """
    statistics.check_finite(name, weights, activations)
    rows = statistics.expert_rows(activations, weights.num_experts, config.seed)
    stats = statistics.collect(weights, activations, rows, gating)
    bases = bases or shared_bases(stats, config)
    return LayerProblem(
        name,
        weights,
        activations,
        rows,
        gating,
        stats,
        bases,
        spectral.expert_factors(weights, bases),
        bases.input_basis.dequantize(),
        bases.output_basis.dequantize(),
        config,
    )


def error_feedback(moment: Tensor, config: BitsMoEConfig) -> Tensor:
    """``rounding.feedback_factor``, of the diagonal alone if the config switches feedback off."""
    if not config.feedback:
        moment = torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))
    return rounding.feedback_factor(moment, config.damping)


def rank_feedback(problem: LayerProblem, experts: range | list[int]) -> Tensor:
    """``[2, e, r, r]`` feedback factors of gate and up."""
    moments = [
        statistics.input_covariance(
            problem.input_basis,
            problem.statistics,
            problem.activations,
            problem.rows[expert],
            problem.config.covariance_prior,
        )
        for expert in experts
    ]
    return error_feedback(torch.stack(moments, 1), problem.config)
