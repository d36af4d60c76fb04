"""What quantization has finished so far, kept in memory.

The pipeline hands over every finished layer and asks for what it needs later. ``progress_on_disk`` keeps the
same on disk, where a run that was interrupted finds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from bitsmoe_plugin.allocation.row_widths import Widths
from bitsmoe_plugin.calibration.super_experts import ExpertOutputs
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.pipeline.layer_plan import LayerPlan
from bitsmoe_plugin.spectral.bases import SharedBases

Hidden = list[Tensor]
"""Hidden states of all calibration tokens, ``[blocks, sequence_length, H]`` per batch."""


@dataclass(frozen=True)
class PlannedLayer:
    """What the first pass finds out about an MoE layer.

    Attributes:
        plan: what its rows would cost.
        outputs: what its experts put out.
    """

    plan: LayerPlan
    outputs: ExpertOutputs


@dataclass(frozen=True)
class PackedLayer:
    """Attributes:
    name: of the experts module.
    packed: the layer as it is stored.
    entry: of the layer in ``BitsMoEConfig.layers``.
    """

    name: str
    packed: PackedExperts
    entry: dict[str, Any]


class Progress(Protocol):
    """Finished work. Layers are numbered as decoder layers; dense ones have no plan and are not packed."""

    planned: int
    """Decoder layers that the first pass has finished."""
    rounded: int
    """Decoder layers that the second pass has finished."""
    widths: Widths | None
    at_once: int | None
    """Blocks that layers are given at once, as of the last finished layer; None: none is finished. How
    products are rounded may depend on it."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of the parts of all finished work, see ``base.spans``; added to while more is done."""

    def check_weights(self, name: str, digest: str) -> None:
        """Refuse weights other than those that were read for this layer before."""

    dense_costs: dict[int, list[list[float]]]
    """Index of a decoder layer -> costs of its units of linear layers, see ``dense_costs``; written before
    ``finish_plan`` of the layer."""

    def finish_plan(self, index: int, layer: PlannedLayer | None, hidden: Hidden) -> None:
        """Layer ``index`` is planned and puts out ``hidden``."""

    def plan(self, index: int) -> PlannedLayer:
        """An MoE layer that is planned."""

    def plan_hidden(self) -> Hidden | None:
        """What the last planned layer put out; None if there is none or it is still known to the caller."""

    def finish_widths(self, widths: Widths) -> None:
        """The allocation is done."""

    def finish_layer(
        self, index: int, layer: PackedLayer | None, exact: Hidden, hidden: Hidden, dense: dict[str, Tensor]
    ) -> None:
        """Layer ``index`` is rounded; the unquantized model puts out ``exact`` there, this one ``hidden``.

        Args:
            dense: stored tensors of its linear layers, by name.
        """

    def packed(self, index: int) -> PackedLayer:
        """An MoE layer that is rounded."""

    def dense(self, index: int) -> dict[str, Tensor]:
        """Stored tensors of the linear layers of a layer that is rounded, by name."""

    def layer_hidden(self) -> tuple[Hidden, Hidden] | None:
        """``exact`` and ``hidden`` of the last rounded layer; None as for ``plan_hidden``."""


def check_digest(known: dict[str, str], name: str, digest: str) -> None:
    """Note the digest of a layer's weights.

    Raises:
        QuantizationError: another one is known.
    """
    if known.setdefault(name, digest) != digest:
        raise QuantizationError(
            f"{name}: the model's weights are not those that were read before; its files were changed while "
            "the model was quantized. Start over with files that stay as they are"
        )


def with_contiguous_bases(plan: LayerPlan) -> LayerPlan:
    """The plan with its bases laid out as a file would return them.

    Matrix products of strided operands may be rounded otherwise, and rounding reuses the bases.
    """
    bases = [
        replace(basis, codes=basis.codes.contiguous(), scales=basis.scales.contiguous())
        for basis in (plan.bases.input_basis, plan.bases.output_basis)
    ]
    return replace(plan, bases=SharedBases(*bases))


class ProgressInMemory:
    """Progress of a run that cannot be continued by another; see ``Progress``."""

    def __init__(self) -> None:
        self.planned = self.rounded = 0
        self.widths: Widths | None = None
        self.at_once: int | None = None
        self.dense_costs: dict[int, list[list[float]]] = {}
        self.seconds: dict[str, float] = {}
        self._digests: dict[str, str] = {}
        self._plans: dict[int, PlannedLayer] = {}
        self._packed: dict[int, PackedLayer] = {}

    def check_weights(self, name: str, digest: str) -> None:
        check_digest(self._digests, name, digest)

    def finish_plan(self, index: int, layer: PlannedLayer | None, hidden: Hidden) -> None:
        if layer is not None:
            self._plans[index] = replace(layer, plan=with_contiguous_bases(layer.plan))
        self.planned = index + 1

    def plan(self, index: int) -> PlannedLayer:
        return self._plans[index]

    def plan_hidden(self) -> Hidden | None:
        return None

    def finish_widths(self, widths: Widths) -> None:
        self.widths = widths

    def finish_layer(
        self, index: int, layer: PackedLayer | None, exact: Hidden, hidden: Hidden, dense: dict[str, Tensor]
    ) -> None:
        self._plans.pop(index, None)
        if layer is not None:
            self._packed[index] = layer
        self.rounded = index + 1

    def packed(self, index: int) -> PackedLayer:
        return self._packed[index]

    def dense(self, index: int) -> dict[str, Tensor]:
        return {}  # asked for by runs that go on; this one ends with its process

    def layer_hidden(self) -> tuple[Hidden, Hidden] | None:
        return None
