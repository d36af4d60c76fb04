"""Tuning of some decoder layers in a row towards what the original puts out after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.layerwise_forward import is_out_of_memory
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.pipeline.descent import Descent
from bitsmoe_plugin.pipeline.tunable_layer import Served, TunableLayer
from bitsmoe_plugin.pipeline.tunable_weights import TunableWeights, learnt_weights
from bitsmoe_plugin.pipeline.tune_scales import computed_by
from bitsmoe_plugin.pipeline.tuning_progress import TunedBlock
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings
from bitsmoe_plugin.pipeline.tuning_streams import Chunk, Streams, Target
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


@dataclass(frozen=True)
class LearntBlock:
    """Attributes:
    block: what came of it.
    packed: name of an experts module -> its tensors with what was learnt.
    parameters: others that were learnt, which hold it.
    """

    block: TunedBlock
    packed: dict[str, PackedExperts] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def parameters_in(self, layer: nn.Module) -> dict[str, Tensor]:
        """Those of a decoder layer, by their names in it."""
        own = {id(parameter) for parameter in self.parameters}
        return {name: p.detach() for name, p in layer.named_parameters() if id(p) in own}


@dataclass
class LayerDescent:
    """Attributes:
    layers: decoder layers in a row.
    modules: packed experts in them, by name.
    bar: is told of every step.
    """

    streams: Streams
    layers: list[int]
    modules: dict[str, BitsMoEExperts]
    settings: TuningSettings
    bar: Any
    _learners: dict[str, TunableLayer] = field(default_factory=dict)

    def run(self) -> LearntBlock:
        """Learn; parameters that are not packed are left as they were learnt.

        Raises:
            QuantizationError: the error is not finite.
        """
        self._learners = {n: TunableLayer(module, self.settings.learn) for n, module in self.modules.items()}
        parameters = [
            p for i in self.layers for p in learnt_weights(self.streams.layers[1][i], self.settings.learn)
        ]
        weights = TunableWeights(parameters)
        if not any(layer.gains for layer in self._learners.values()) and not weights.gains:
            error = self._held()
            return LearntBlock(TunedBlock(self.layers, 0, error, error))
        learnt = [chunk for chunk in self.streams.chunks if not chunk.held]
        descent = Descent(
            list(self._learners.values()), weights, self.settings, sum(chunk.batches for chunk in learnt)
        )
        with weights.learnt():
            block = self._learn(descent, learnt)
        tuned = {name: layer.tuned() for name, layer in self._learners.items()}
        return LearntBlock(block, tuned, parameters)

    def _learn(self, descent: Descent, chunks: list[Chunk]) -> TunedBlock:
        order = torch.Generator().manual_seed(self.settings.seed + self.layers[0])
        before = self._held()
        best, best_gains = TunedBlock(self.layers, 0, before, before), descent.gains()
        for epoch in range(1, self.settings.epochs + 1):
            with computed_by(self.modules, self._learners):
                for place in torch.randperm(len(chunks), generator=order, device="cpu").tolist():
                    self._learn_chunk(descent, chunks[place], order, best)
            error = self._held()
            if error < best.after:
                best = TunedBlock(self.layers, epoch, before, error)
                best_gains = descent.gains()
        descent.go_back_to(best_gains)
        return best

    def _learn_chunk(self, descent: Descent, chunk: Chunk, order: torch.Generator, best: TunedBlock) -> None:
        targets = self.streams.targets(self.layers, chunk=chunk)
        for number in torch.randperm(len(targets), generator=order, device="cpu").tolist():
            target = targets[number]
            loss = self._step(descent, chunk, target)
            shown = f"{self.layers[-1]}: {loss:.3g}"
            self.bar.set_postfix(layer=shown, held_out=f"{best.after:.3g}", refresh=False)
            self.bar.update()

    def _step(self, descent: Descent, chunk: Chunk, target: Target) -> float:
        try:
            found = chunk.packed.through(self.layers, target.number, target.hidden, target.left)
            return descent.step(self._finite(target.error(found)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise QuantizationError(
                f"out of memory in a step of {target.hidden.shape[0]} blocks of {target.hidden.shape[1]} "
                f"tokens at decoder layer {self.layers[-1]}; use a smaller batch_size, fewer layers_at_once "
                "or a smaller sequence_length"
            ) from error

    @torch.no_grad()
    def _held(self) -> float:
        """Error on text held out, of layers as they will be served."""
        served: Mapping[str, Any] = {n: Served.of(self._learners[n], m) for n, m in self.modules.items()}
        total, blocks = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        with computed_by(self.modules, served, complete=True):
            for chunk in self.streams.held():
                for target in self.streams.targets(self.layers, chunk=chunk):
                    found = chunk.packed.through(self.layers, target.number, target.hidden, target.left)
                    error = self._finite(target.error(found))
                    total += error.double().cpu() * len(target.hidden)
                    blocks += len(target.hidden)
        return float(total / blocks)

    def _finite(self, error: Tensor) -> Tensor:
        if not torch.isfinite(error):
            raise QuantizationError(
                f"decoder layer {self.layers[-1]}: the distance from the original is not finite. If the "
                "first steps went well, take a smaller learning rate"
            )
        return error
