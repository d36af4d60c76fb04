"""What the two passes over the layers of a model, ``plan_pass`` and ``round_pass``, share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from bitsmoe_plugin.allocation.budget import Budget
from bitsmoe_plugin.allocation.sub_budgets import layer_share
from bitsmoe_plugin.allocation.super_expert_policy import row_groups
from bitsmoe_plugin.base.free_memory import release_free_memory
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.calibration.residual_gain import as_seen_by_the_stream
from bitsmoe_plugin.codec.dense import DenseScheme
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.dense_units import DenseUnit
from bitsmoe_plugin.models.expert_source import ExpertSource, weights_digest
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.models.families import MoELayer
from bitsmoe_plugin.pipeline.progress import Hidden, Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What the two passes share.

    Attributes:
        layers: number of decoder layers.
        moe: index of a decoder layer -> its MoE layer, in forward order; dense ones are left out.
        dense: index of a decoder layer, or -1 for what is in none -> its linear layers that are stored in
            fewer bits, by name, and how.
        units: linear layers whose widths are chosen after the first pass.
        tokens: statistics see the first so many, the others are held out.
        stop: tells whether to stop at the next layer's edge; the first of ``workers`` is asked.
        progress: of the first of ``workers``; the others' stays empty.
    """

    model: nn.Module
    forward: LayerwiseForward
    layers: int
    moe: dict[int, MoELayer]
    source: ExpertSource
    progress: Progress
    budget: Budget
    tokens: int
    config: BitsMoEConfig
    stop: Callable[[], bool]
    workers: Workers
    dense: dict[int, dict[str, DenseScheme]] = field(default_factory=dict)
    units: list[DenseUnit] = field(default_factory=list)

    @contextmanager
    def loaded(self, layer: MoELayer) -> Iterator[ExpertWeights]:
        """The weights of a layer, the same as when it was loaded before."""
        with ExitStack() as stack:
            with span("reading weights"):
                weights = stack.enter_context(self.source.loaded(layer))
                self.progress.check_weights(layer.name, weights_digest(layer))
            yield weights

    def share(self, index: int) -> int:
        """What the rows of decoder layer ``index`` would spend if it got its share of every budget."""
        groups = row_groups(self.source, self.config, self.budget, [()] * len(self.moe))
        return layer_share(groups, self.source.shapes, list(self.moe).index(index))

    def seen(self, activations: LayerActivations, gains: Tensor | None) -> LayerActivations:
        """What statistics see of a layer."""
        alike = self.config.token_weighting == "none"
        return as_seen_by_the_stream(activations, gains, alike).first(self.tokens)

    def agreed(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns, by passes of as many blocks at once as all workers have memory for.

        Args:
            compute: runs decoder layers; the same ones in all workers. Called again in all of them if one ran
                out of memory: products of other shapes differ in their last bits.
        """
        while True:
            before = self.forward.at_once
            result = compute()
            fewest = min(self.workers.all(self.forward.at_once))
            if self.workers.size == 1 or fewest == before:
                return result
            if fewest < self.forward.at_once:
                self.forward.limit(fewest)

    def in_turns(self, first: int, moe_layers: int, text: str) -> Iterator[list[int]]:
        """Indices of the decoder layers from ``first`` on, with a progress bar.

        Args:
            moe_layers: so many MoE layers are in a turn, with the dense layers between them, which otherwise
                have a turn each.

        Raises:
            Interrupted: before a turn, if it is time to stop.
        """
        turn: list[int] = []
        with logging.tqdm(desc=text, initial=first, total=self.layers) as bar:
            for index in range(first, self.layers):
                if not turn and self.workers.from_main(self.stop):
                    raise Interrupted(
                        f"{text.lower()} stopped after {index} of {self.layers}; {self.config.work_dir} "
                        "holds what is finished. Start the same again to go on"
                    )
                turn.append(index)
                if index + 1 < self.layers and sum(i in self.moe for i in turn) not in (0, moe_layers):
                    continue
                release_free_memory()
                yield turn
                bar.update(len(turn))
                turn = []


def finite(index: int, outputs: Hidden) -> Hidden:
    """The outputs of a decoder layer, if they are finite; of unquantized MoE layers ``build_problem`` sees to
    that."""
    if not all(bool(torch.isfinite(batch).all()) for batch in outputs):
        raise QuantizationError(
            f"decoder layer {index} puts out NaN or infinity on the calibration text; check the checkpoint, "
            "or load it in another dtype"
        )
    return outputs
