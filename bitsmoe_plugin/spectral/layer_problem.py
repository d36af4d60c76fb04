"""Everything that is known about one layer when its experts are quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.devices import computing_on, working_set
from bitsmoe_plugin.base.linalg import product, rows
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration import statistics
from bitsmoe_plugin.calibration.activations import ExpertTokens, LayerActivations, expert_tokens
from bitsmoe_plugin.calibration.statistics import LayerStatistics
from bitsmoe_plugin.codec.basis import quantize_basis
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights
from bitsmoe_plugin.models.gating import Gating
from bitsmoe_plugin.spectral import bases as spectral_bases
from bitsmoe_plugin.spectral.bases import BasisInverses, Experts, SharedBases
from bitsmoe_plugin.spectral.moments import HiddenMoments, basis_moments, pooled_covariance
from bitsmoe_plugin.spectral.statistics_tokens import statistics_tokens

_SECOND_MOMENT_SHRINKAGE = 1e-3
_ENERGY_TOKENS = 2048
"""Of a layer, from which its output energy is taken."""
_BLOCK = 4096
"""Tokens whose inputs are in float32 at a time."""


@dataclass(frozen=True)
class LayerProblem:
    """Everything known about one layer: its weights, calibration and bases.

    Factors are computed when they are needed: in float32 those of all experts take twice the memory of
    the weights.

    Attributes:
        tokens: of each expert.
        sampled: those that ``statistics``, but for ``second_moment``, are of.
        drift: ``[T, r]`` float32, how far the residual stream after this layer, with its experts exact, is
            from that of the unquantized model, in coordinates of the output basis; None if the layer shall
            not make up for it.
        z: ``[1 or 2, T, r]`` float32, input bases (as they will be stored) times inputs; the first is
            of gate, the last of up.
        pooled: ``[1 or 2, r, r]`` float32, see ``moments.pooled_covariance``.
        output_basis: ``[H, r]`` float32, dequantized.
        biases: of the experts, None if they have none.
        hidden_moments: None where the layer is rounded.
        output_energy: E[omega |y|^2 / H]; 0 where the layer is rounded.
    """

    name: str
    weights: ExpertWeights
    activations: LayerActivations
    tokens: list[ExpertTokens]
    sampled: list[ExpertTokens]
    gating: Gating
    statistics: LayerStatistics
    bases: SharedBases
    inverses: BasisInverses
    z: Tensor
    pooled: Tensor
    output_basis: Tensor
    config: BitsMoEConfig
    drift: Tensor | None = None
    biases: ExpertBiases | None = None
    hidden_moments: HiddenMoments | None = None
    output_energy: float = 0.0

    @property
    def shape(self) -> LayerShape:
        return self.weights.shape

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.activations.hidden.device

    @property
    def input_bases(self) -> Tensor:
        """``[1 or 2, r, H]`` float32, dequantized; the first is of gate, the last of up."""
        return self.bases.input_bases()

    def input_factors(self, experts: Experts) -> Tensor:
        """``[n, e, r, I]`` float32, see ``bases.input_factors``."""
        return spectral_bases.input_factors(self.weights, self.inverses, experts)

    def down_factors(self, experts: Experts) -> Tensor:
        """``[e, r, I]`` float32, see ``bases.down_factors``."""
        return spectral_bases.down_factors(self.weights, self.inverses, experts)

    def sample(self, expert: int, most: int) -> ExpertTokens:
        """At most so many tokens of an expert, always the same."""
        seed = self.config.seed + expert
        return self.tokens[expert].sampled(most, self.activations.token_weights, seed)

    def hidden(self, *products: Tensor, expert: int) -> Tensor:
        """Hidden activations ``[n, I]`` of an expert from its gate and up, or up, products ``[n, I]``."""
        return self.gating(*(products if self.biases is None else self.biases.add(*products, expert=expert)))

    def chunks(self, experts: int) -> list[slice]:
        """Positions 0..experts in groups of bounded working set."""
        return expert_groups(experts, self.pooled.numel(), self.device)


def expert_groups(experts: int, covariance: int, device: torch.device) -> list[slice]:
    """Positions 0..experts in groups of bounded working set.

    Args:
        covariance: values that the covariances of an expert hold.
    """
    size = max(1, working_set(device) // covariance)
    return [slice(start, min(start + size, experts)) for start in range(0, experts, size)]


@span("bases")
def shared_bases(
    weights: ExpertWeights, stats: LayerStatistics, hidden: HiddenMoments, config: BitsMoEConfig
) -> SharedBases:
    """Bases of a layer, quantized as the config says."""
    moments = basis_moments(weights, stats, hidden, config.neuron_weighting)
    if config.whitening:
        metric = spectral_bases.shrink(stats.second_moment, _SECOND_MOMENT_SHRINKAGE)
        outputs = moments.output
    else:
        metric = torch.eye(weights.hidden_size, dtype=torch.float64, device=moments.gram.device)
        outputs = sum(down.double() @ down.double().T for down in weights.down)
    # Of experts without a gate there is one.
    grams = moments.gram.sum(0, keepdim=True) if config.joint_basis else moments.gram
    given = torch.cat([spectral_bases.input_basis(gram, metric) for gram in grams])
    out = spectral_bases.output_basis(outputs)
    return SharedBases(
        quantize_basis(given, config.basis_bits, config.basis_group_size),
        quantize_basis(out, config.basis_bits, config.basis_group_size),
    )


def build_problem(
    name: str,
    weights: ExpertWeights,
    activations: LayerActivations,
    gating: Gating,
    config: BitsMoEConfig,
    bases: SharedBases | None = None,
    drift: Tensor | None = None,
    biases: ExpertBiases | None = None,
) -> LayerProblem:
    """Collect what is known about one layer, to plan it or, if ``bases`` are given, to round it.

    All of it, and what is computed from it, is on the device of ``activations``; the other arguments may be
    elsewhere.

    Args:
        drift: ``[T, H]``, otherwise as in ``LayerProblem``.
        biases: see there.

    Raises:
        QuantizationError: NaN or infinity in weights, activations or statistics.
    """
    device = activations.hidden.device
    with computing_on(device):
        return _collected(
            name,
            weights.to(device),
            activations,
            gating,
            config,
            None if bases is None else bases.to(device),
            None if drift is None else drift.to(device),
            None if biases is None else biases.to(device),
        )


def _collected(
    name: str,
    weights: ExpertWeights,
    activations: LayerActivations,
    gating: Gating,
    config: BitsMoEConfig,
    bases: SharedBases | None,
    drift: Tensor | None,
    biases: ExpertBiases | None,
) -> LayerProblem:
    """``build_problem`` of tensors on one device."""
    statistics.check_finite(name, weights, activations)
    tokens = expert_tokens(activations, weights.num_experts, config.seed, config.all_experts)
    plan = bases is None
    sampled = statistics_tokens(weights.shape, activations, tokens, config, plan)
    hidden = HiddenMoments(weights, config, [own.routed for own in sampled]) if plan else None
    stats = statistics.collect(
        weights,
        activations,
        tokens,
        gating,
        config.neuron_weighting,
        biases,
        sampled,
        take=None if hidden is None else hidden.take,
        peaks=plan,
    )
    others = {} if hidden is None else {"hidden_moment": hidden.energy}
    statistics.check_finite_statistics(name, stats, **others)
    energy = 0.0
    if bases is None:
        assert hidden is not None
        bases = shared_bases(weights, stats, hidden, config)
        some = activations.sampled(_ENERGY_TOKENS, config.seed)
        energy = statistics.output_energy(weights, some, gating, biases)
    input_bases, inverses = bases.input_bases(), BasisInverses.of(bases)
    return LayerProblem(
        name=name,
        weights=weights,
        activations=activations,
        tokens=tokens,
        sampled=sampled,
        gating=gating,
        statistics=stats,
        bases=bases,
        inverses=inverses,
        z=torch.stack([_in_basis(activations.hidden, basis) for basis in input_bases]),
        pooled=pooled_covariance(input_bases, stats),
        output_basis=bases.output_basis.dequantize(),
        config=config,
        drift=None if drift is None else _in_basis(drift, inverses.output),
        biases=biases,
        hidden_moments=hidden,
        output_energy=energy,
    )


def _in_basis(vectors: Tensor, basis: Tensor) -> Tensor:
    """``basis vectors[t]``, ``[T, r]`` float32, of ``[T, H]`` in any dtype and ``[r, H]``."""
    result, directions = torch.empty(len(vectors), len(basis), device=vectors.device), rows(basis)
    for part, block in zip(result.split(_BLOCK), vectors.split(_BLOCK), strict=True):
        product(rows(block), directions, out=part)
    return result
