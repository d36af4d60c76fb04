"""Calibration text on its way through the original and the packed model, layer by layer, in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.blocks import held_out_last
from bitsmoe_plugin.calibration.carried import left_beside
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward, token_weights
from bitsmoe_plugin.models.expert_source import ExpertSource
from bitsmoe_plugin.pipeline.run import finite
from bitsmoe_plugin.pipeline.tuning_progress import TuningProgress

CHUNK = 16384
"""Tokens of a chunk: hidden states of so many are in memory at once, of each stream that is at work."""


@dataclass(frozen=True)
class Chunk:
    """Some blocks of calibration text.

    Attributes:
        number: from 0.
        held: whether nothing is learnt from them.
        original, packed: what passes them through the layers of either model.
        batches: of a step each.
    """

    number: int
    held: bool
    original: LayerwiseForward
    packed: LayerwiseForward
    batches: int


@dataclass(frozen=True)
class Target:
    """One batch at the layers that are tuned.

    Attributes:
        number: in its chunk.
        hidden: ``[blocks, tokens, H]``, what the packed model gives them.
        left: beside it.
        wanted: what the original puts out.
        weights: ``[blocks, tokens]`` float32, of the tokens in the error.
    """

    number: int
    hidden: Tensor
    left: Any
    wanted: Tensor
    weights: Tensor

    def error(self, found: Tensor) -> Tensor:
        """Mean weighted square of what is missing in ``found``."""
        squares = (found.float() - self.wanted.float()).flatten(2).square().mean(-1)
        return (squares * self.weights).mean()


class Streams:
    """The chunks, and where their hidden states are kept.

    Attributes:
        layers: decoder layers of the original and of the packed model.
        chunks: those that are held out come last.
        device: of hidden states.
        tokens: that are learnt from.
    """

    def __init__(
        self,
        models: tuple[Any, Any],
        layers: tuple[nn.ModuleList, nn.ModuleList],
        source: ExpertSource,
        blocks: Tensor,
        settings: Any,
        progress: TuningProgress,
        weighting: str,
    ) -> None:
        """
        Args:
            models, layers: the original and the packed model, and their decoder layers.
            source: of the original's experts.
            blocks: ``[blocks, sequence_length]`` int64; the last are held out, see ``held_out_last``.
            weighting: of tokens, see ``capture_layer``.
        """
        self._source, self._progress, self._weighting = source, progress, weighting
        self.layers = layers
        self._moe = {int(layer.layer_name.rpartition(".")[2]): layer for layer in source.layers}
        self.device = next(models[0].parameters()).device
        blocks, seen = held_out_last(blocks, settings.held_out)
        self.tokens = seen * blocks.shape[1]
        size = settings.batch_size
        at_once = max(size, CHUNK // blocks.shape[1] // size * size)
        self.chunks: list[Chunk] = []
        for held, part in ((False, blocks[:seen]), (True, blocks[seen:])):
            for own in part.split(at_once):
                forwards = [
                    LayerwiseForward(model, own_layers, own, size)
                    for model, own_layers in zip(models, layers, strict=True)
                ]
                self._begin(len(self.chunks), held, forwards)
                original, packed = forwards
                batches = -(-len(own) // size)
                self.chunks.append(Chunk(len(self.chunks), held, original, packed, batches))
        if not progress.embedded:
            progress.begin(len(self.chunks))
        self.agree()

    def _begin(self, number: int, held: bool, forwards: list[LayerwiseForward]) -> None:
        original, packed = (forward.take_embedded() for forward in forwards)
        if self._progress.embedded:
            return
        self._progress.exact.write(0, number, original)
        self._progress.hidden.write(0, number, packed)
        if held:
            self._progress.untuned.write(0, number, packed)

    def agree(self) -> None:
        """Have all chunks pass as many blocks at once as that with the least memory, also in a later run: how
        products are rounded may depend on it."""
        forwards = [forward for chunk in self.chunks for forward in (chunk.original, chunk.packed)]
        fewest = min(forward.at_once for forward in forwards)
        fewest = min(fewest, self._progress.at_once or fewest)
        for forward in forwards:
            if forward.at_once > fewest:
                forward.limit(fewest)
        self._progress.at_once = fewest

    def pass_original(self, layers: list[int]) -> None:
        """What the original's layers put out; of its experts one layer's are in memory at a time."""
        for index in layers:
            if index in self._moe:
                with self._source.loaded(self._moe[index]):
                    self._pass_original(index)
            else:
                self._pass_original(index)

    def _pass_original(self, index: int) -> None:
        for chunk in self.chunks:
            hidden = chunk.original.run(index, self._progress.exact.read(index, chunk.number))
            self._progress.exact.write(index + 1, chunk.number, finite(index, hidden))

    def pass_packed(self, layers: list[int], *, untuned: bool = False) -> None:
        """What the packed model's layers put out, as they are now.

        Args:
            untuned: of text held out alone, after layers that were not tuned.
        """
        stream = self._progress.untuned if untuned else self._progress.hidden
        for chunk in self.chunks:
            if untuned and not chunk.held:
                continue
            hidden: list[Tensor] = stream.read(layers[0], chunk.number)
            for index in layers:
                hidden = finite(index, chunk.packed.run(index, hidden))
            stream.write(layers[-1] + 1, chunk.number, hidden)

    def targets(self, layers: list[int], *, chunk: Chunk) -> list[Target]:
        """What is to be learnt of a chunk."""
        inputs = self._progress.hidden.read(layers[0], chunk.number)
        wanted = self._progress.exact.read(layers[-1] + 1, chunk.number)
        exact = self._progress.exact.read(layers[0], chunk.number)
        batches = zip(exact, inputs, left_beside(inputs), wanted, strict=True)
        return [
            Target(number, hidden, left, out, self._weights(given, out))
            for number, (given, hidden, left, out) in enumerate(batches)
        ]

    def _weights(self, inputs: Tensor, wanted: Tensor) -> Tensor:
        return token_weights([inputs], [wanted], self._weighting).view(wanted.shape[:2])

    def held(self) -> Iterator[Chunk]:
        """Chunks that nothing is learnt from."""
        return (chunk for chunk in self.chunks if chunk.held)

    def divergences(self) -> tuple[float, float]:
        """KL(original || packed) on text held out, nats per token, before and after tuning: at the end of the
        last layer."""
        last, sums, tokens = len(self.layers[0]), torch.zeros(2, dtype=torch.float64, device="cpu"), 0
        for chunk in self.held():
            streams = self._progress.untuned, self._progress.hidden
            exact, *others = (s.read(last, chunk.number) for s in (self._progress.exact, *streams))
            found = [chunk.packed.logits(hidden) for hidden in others]
            for wanted, *given in zip(chunk.original.logits(exact), *found, strict=True):
                target = wanted.float().log_softmax(-1)
                tokens += target.shape[:-1].numel()
                divergence = partial(nn.functional.kl_div, target=target, log_target=True, reduction="sum")
                sums += torch.stack([divergence(one.float().log_softmax(-1)).double().cpu() for one in given])
        before, after = (sums / tokens).tolist()
        return before, after
