"""Progress on disk: a run that was interrupted at any moment is continued, with the same result.

What grows with the depth of the model (plans, packed layers) is mapped from its files, not held in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.allocation.row_widths import Widths
from bitsmoe_plugin.base.work_directory import WorkDirectory
from bitsmoe_plugin.calibration.super_experts import ExpertOutputs
from bitsmoe_plugin.codec.basis import QuantizedBasis
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.pipeline.hidden_files import listed, numbered
from bitsmoe_plugin.pipeline.layer_plan import LayerPlan
from bitsmoe_plugin.pipeline.progress import Hidden, PackedLayer, PlannedLayer, check_digest
from bitsmoe_plugin.spectral.bases import SharedBases
from bitsmoe_plugin.spectral.row_weights import RowWeights

_BASES = ("input_basis", "output_basis")


class ProgressOnDisk:
    """Progress in a work directory, which holds that of one identity; see ``Progress``."""

    def __init__(self, directory: WorkDirectory, identity: dict[str, Any], device: torch.device) -> None:
        """
        Args:
            identity: JSON-ready: everything that the result depends on.
            device: of hidden states.

        Raises:
            QuantizationError: the directory holds progress of another identity.
        """
        self._directory, self._device = directory, device
        if {"tuning", "descent"} & directory.state.keys() and "identity" not in directory.state:
            raise directory.damaged("it holds layers of a packed model that is being tuned")
        if not directory.state:
            directory.state.update(
                identity=identity,
                planned=0,
                rounded=0,
                entries={},
                digests={},
                gap=None,
                kept={},
                found={},
                seconds={},
            )
            directory.commit()
        directory.check_identity(directory.state["identity"], identity, "progress")
        self._state = directory.state
        self.planned, self.rounded = self._state["planned"], self._state["rounded"]
        stored = self._state.setdefault("dense_costs", {})
        self.dense_costs = {int(index): costs for index, costs in stored.items()}
        self.widths = self._read_widths() if self._state["gap"] is not None else None

    @property
    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = self._state["seconds"]
        return found  # committed with the layer

    @property
    def at_once(self) -> int | None:
        return self._state.get("at_once")

    @at_once.setter
    def at_once(self, blocks: int | None) -> None:
        self._state["at_once"] = blocks  # committed with the layer

    def check_weights(self, name: str, digest: str) -> None:
        check_digest(self._state["digests"], name, digest)

    def finish_plan(self, index: int, layer: PlannedLayer | None, hidden: Hidden) -> None:
        if layer is not None:
            plan, outputs = layer.plan, layer.outputs
            tensors = {"costs": plan.costs, "energies": plan.energies, "peaks": outputs.peaks}
            values: dict[str, Any] = {
                "correction": plan.correction,
                "output_energy": plan.output_energy,
                "massive": outputs.massive,
            }
            if plan.row_weights is not None:
                tensors |= {f"weights.{name}": tensor for name, tensor in vars(plan.row_weights).items()}
            for name in _BASES:
                basis: QuantizedBasis = getattr(plan.bases, name)
                tensors |= {f"{name}.codes": basis.codes, f"{name}.scales": basis.scales}
                values[name] = {"bits": basis.bits, "group_size": basis.group_size}
            self._directory.write(f"plan-{index}.safetensors", tensors, values)
        self._directory.write(f"calibrated-{index}.safetensors", numbered("hidden", hidden))
        self._directory.forget(f"calibrated-{index - 1}.safetensors")
        self.planned = self._state["planned"] = index + 1
        self._state["dense_costs"] = {str(i): costs for i, costs in self.dense_costs.items()}
        self._directory.commit()

    def plan(self, index: int) -> PlannedLayer:
        tensors, values = self._directory.read(f"plan-{index}.safetensors")
        # All but the costs, of which every layer's are needed at once, are copied: how matrix products are
        # rounded may depend on where their operands are in memory.
        bases = [
            QuantizedBasis(
                codes=tensors[f"{name}.codes"].clone(),
                scales=tensors[f"{name}.scales"].clone(),
                **values[name],
            )
            for name in _BASES
        ]
        weights = {
            name.removeprefix("weights."): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith("weights.")
        }
        plan = LayerPlan(
            costs=tensors["costs"],
            energies=tensors["energies"].clone(),
            bases=SharedBases(*bases),
            correction=values["correction"],
            output_energy=values["output_energy"],
            row_weights=RowWeights(**weights) if weights else None,
        )
        return PlannedLayer(plan, ExpertOutputs(tensors["peaks"].clone(), values["massive"]))

    def plan_hidden(self) -> Hidden | None:
        if self.planned == 0 or self.widths is not None:
            return None
        tensors, _ = self._directory.read(f"calibrated-{self.planned - 1}.safetensors")
        return listed("hidden", tensors, self._device)

    def finish_widths(self, widths: Widths) -> None:
        tensors = {str(index): rows for index, rows in widths.rows.items()}
        self._directory.write("widths.safetensors", tensors)
        self._directory.forget(f"calibrated-{self.planned - 1}.safetensors")
        self._state["gap"] = widths.relative_gap
        self._state["units"] = list(widths.dense)
        for name, experts in (("kept", widths.kept), ("found", widths.super_experts)):
            self._state[name] = {str(index): list(ids) for index, ids in experts.items()}
        self._directory.commit()
        self.widths = widths

    def _read_widths(self) -> Widths:
        tensors, _ = self._directory.read("widths.safetensors")
        kept, found = (
            {int(index): tuple(ids) for index, ids in self._state[name].items()} for name in ("kept", "found")
        )
        rows = {int(index): row_bits for index, row_bits in tensors.items()}
        return Widths(rows, kept, self._state["gap"], found, tuple(self._state.get("units", ())))

    def finish_layer(
        self, index: int, layer: PackedLayer | None, exact: Hidden, hidden: Hidden, dense: dict[str, Tensor]
    ) -> None:
        if dense:
            self._directory.write(f"dense-{index}.safetensors", dense)
            self._state.setdefault("dense", []).append(index)
        if layer is not None:
            self._directory.write(f"packed-{index}.safetensors", dict(layer.packed.tensors()))
            self._state["entries"][str(index)] = {"name": layer.name, "entry": layer.entry}
        tensors = numbered("exact", exact) | numbered("hidden", hidden)
        self._directory.write(f"rounded-{index}.safetensors", tensors)
        self._directory.forget(f"rounded-{index - 1}.safetensors")
        self._directory.forget(f"plan-{index}.safetensors")
        self.rounded = self._state["rounded"] = index + 1
        self._directory.commit()

    def packed(self, index: int) -> PackedLayer:
        tensors, _ = self._directory.read(f"packed-{index}.safetensors")
        packed = PackedExperts(**{name.removeprefix("bitsmoe_"): tensor for name, tensor in tensors.items()})
        entry = self._state["entries"][str(index)]
        return PackedLayer(entry["name"], packed, entry["entry"])

    def dense(self, index: int) -> dict[str, Tensor]:
        if index not in self._state.get("dense", []):
            return {}
        tensors, _ = self._directory.read(f"dense-{index}.safetensors")
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def layer_hidden(self) -> tuple[Hidden, Hidden] | None:
        if self.rounded == 0:
            return None
        tensors, _ = self._directory.read(f"rounded-{self.rounded - 1}.safetensors")
        return listed("exact", tensors, self._device), listed("hidden", tensors, self._device)
