"""What tuning layer by layer has finished, in a work directory: an interrupted run goes on from there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.base.work_directory import WorkDirectory
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.pipeline.hidden_files import HiddenFiles
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

TUNED = ("input_scales", "output_scales", "row_codes", "payload")
"""Packed tensors that tuning changes."""
STREAMS = ("exact", "hidden", "untuned")
"""Hidden states of the original, of the packed model as far as it is tuned, and of it untuned: the latter on
text held out alone."""


@dataclass(frozen=True)
class TunedBlock:
    """Attributes:
    layers: decoder layers that were tuned together.
    epoch: after which what is learnt was taken; 0: nothing was better than what was there.
    before, after: error of the last one's outputs on text held out, over their energy.
    """

    layers: list[int]
    epoch: int
    before: float
    after: float


class TuningProgress:
    """In a work directory, beside what quantization may have left there."""

    def __init__(self, directory: WorkDirectory, identity: dict[str, Any], device: torch.device) -> None:
        """
        Args:
            identity: JSON-ready: everything that the result depends on.
            device: of hidden states.

        Raises:
            QuantizationError: the directory holds progress of another identity.
        """
        state = directory.state.setdefault("tuning", {"identity": identity, "blocks": [], "chunks": 0})
        directory.check_identity(state["identity"], identity, "tuning")
        self.directory, self._state = directory, state
        self.exact, self.hidden, self.untuned = (HiddenFiles(directory, name, device) for name in STREAMS)

    @property
    def blocks(self) -> list[TunedBlock]:
        """Those that are finished, in their order."""
        return [TunedBlock(**block) for block in self._state["blocks"]]

    @property
    def next_layer(self) -> int:
        """The first one that is not finished."""
        return self.blocks[-1].layers[-1] + 1 if self._state["blocks"] else 0

    @property
    def embedded(self) -> bool:
        """Whether the inputs of the next layer are there."""
        return bool(self._state["chunks"])

    @property
    def at_once(self) -> int | None:
        """Blocks that layers are given at once, as of the last finished block; committed with it."""
        return self._state.get("at_once")

    @at_once.setter
    def at_once(self, blocks: int) -> None:
        self._state["at_once"] = blocks

    def begin(self, chunks: int) -> None:
        """The inputs of the first layer are written, in so many chunks."""
        self._state["chunks"] = chunks
        self.directory.commit()

    def finish(self, block: TunedBlock) -> None:
        """A block is tuned, and what its last layer puts out is written."""
        for stream in (self.exact, self.hidden, self.untuned):
            for layer in block.layers:
                stream.forget(layer, self._state["chunks"])
        self._state["blocks"].append(asdict(block))
        self.directory.commit()

    def write(
        self, index: int, packed: PackedExperts | None, weights: dict[str, Tensor], codes: bool
    ) -> None:
        """Keep what was learnt in a decoder layer.

        Args:
            packed: its experts.
            weights: other parameters, by their names in it.
            codes: whether codes were learnt; the payload takes most of the space.
        """
        found = dict(packed.tensors()) if packed is not None else {}
        names = [name for name in TUNED if (codes or name != "payload") and f"bitsmoe_{name}" in found]
        tensors = {name: found[f"bitsmoe_{name}"] for name in names}
        tensors |= {f"weights.{name}": tensor for name, tensor in weights.items()}
        if tensors:
            self.directory.write(_file(index), tensors)

    @torch.no_grad()
    def put(self, index: int, layer: nn.Module) -> None:
        """Give a decoder layer what was learnt there, if anything was."""
        if not self.directory.holds(_file(index)):
            return
        tensors, _ = self.directory.read(_file(index))
        for module in layer.modules():
            if isinstance(module, BitsMoEExperts):
                packed = module.packed()
                device = packed.payload.device
                own = {name: tensors[name].clone().to(device) for name in TUNED if name in tensors}
                module.load_packed(replace(packed, **own))
        for name, tensor in tensors.items():
            if name.startswith("weights."):
                layer.get_parameter(name.removeprefix("weights.")).copy_(tensor)


def _file(layer: int) -> str:
    return f"tuned-{layer}.safetensors"
