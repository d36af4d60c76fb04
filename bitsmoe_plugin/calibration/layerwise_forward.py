"""Blocks of calibration tokens (``calibration.text``) -> what each MoE layer sees of them.

The model is walked one decoder layer at a time: the hidden states of all blocks go through layer
n, then through layer n + 1. Only one layer's inputs are alive at any moment, and a layer that has
been quantized meanwhile passes its real outputs on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.base.free_memory import release_free_memory
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.calibration.blocks import Blocks, Inputs, batches, pieces
from bitsmoe_plugin.calibration.carried import (
    Carried,
    Left,
    joined,
    left_beside,
    left_in,
    left_returned,
    with_left,
)
from bitsmoe_plugin.calibration.recording import RecordedCall, after_layers, logits_after, record_call
from bitsmoe_plugin.calibration.super_experts import seen_by
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.families import routed_inputs


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the machine had no more memory; only devices have an exception of their own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class LayerwiseForward:
    """Runs calibration blocks through a decoder one layer at a time.

    What each layer is called with besides the hidden states (masks, position embeddings), and what is added
    to them between layers (features of images), is taken from the model itself. A layer that runs out
    of memory, and those after it, are given fewer blocks at once; hidden states stay in batches of the size
    that was asked for.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, blocks: Blocks, batch_size: int):
        """
        Args:
            model: a transformers language model, multimodal or not (its ``base_model`` is called).
            layers: its decoder layers.
            blocks: of tokens.
            batch_size: blocks per forward pass.
        """
        self._model, self._layers = model, layers
        self._batches = batches(blocks, batch_size)
        self._at_once = batch_size
        self._calls: list[RecordedCall] = []
        self._returns: int | None = None
        self._embedded = self._record()
        self.hidden = self._embedded

    def _record(self) -> list[Tensor]:
        """Set what the layers are called with, for as many blocks as they get at once; returns the first
        one's inputs, batch by batch."""
        self._calls, embedded = [], []
        for batch in self._batches:
            calls = [self._recorded(piece) for piece in pieces(batch, self._at_once)]
            parts = [call.take_embedded() for call in calls]
            embedded.append(parts[0] if len(parts) == 1 else torch.cat(parts))
            self._calls += calls
        return embedded

    def _recorded(self, piece: Inputs) -> RecordedCall:
        call = record_call(self._model, self._layers, piece, self._returns)
        self._returns = call.returns
        return call

    @span("forward passes")
    def run(
        self, index: int, inputs: list[Tensor] | None = None, again: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """Outputs of layer ``index`` for every batch of ``inputs`` (default: ``hidden``), which stay; and
        beside them what layers left for later ones (see ``carried``).

        Args:
            again: called before the layer is run on all inputs once more, with fewer blocks at once.

        Raises:
            QuantizationError: out of memory with one block.
        """
        while True:
            try:
                return self._run(index, inputs or self.hidden)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self._at_once == 1:
                    longest = max(batch["input_ids"].shape[1] for batch in self._batches)
                    raise QuantizationError(
                        f"out of memory in decoder layer {index} with one block of {longest} tokens; use a "
                        "smaller sequence_length or fewer calibration_tokens"
                    ) from error
            # Out of the handler, so that what the layer had computed is free again.
            self._give_fewer(index)
            again()

    @torch.no_grad()
    def _run(self, index: int, inputs: list[Tensor]) -> Carried:
        calls = iter(self._calls)
        pairs = zip(inputs, left_beside(inputs), strict=True)
        done = [self._run_batch(index, calls, batch, before) for batch, before in pairs]
        return Carried((outputs for outputs, _ in done), [left for _, left in done])

    def _run_batch(
        self, index: int, calls: Iterator[RecordedCall], batch: Tensor, before: Left
    ) -> tuple[Tensor, Left]:
        parts, left_of_parts = [], []
        for start in range(0, len(batch), self._at_once):
            blocks = slice(start, start + self._at_once)
            out, beside = self._run_part(index, next(calls), batch[blocks], before, blocks)
            parts.append(out)
            left_of_parts.append(beside)
        # Contiguous, as hidden states are when they are read from a file: see ``progress_on_disk``.
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts), joined(left_of_parts)

    def through(self, layers: Sequence[int], number: int, hidden: Tensor, left: Left) -> Tensor:
        """Outputs of the last of some layers in a row for one batch; differentiable where autograd records.

        Args:
            number: of the batch.
            hidden, left: inputs of the first layer, and what layers before it left.
        """
        counts = [-(-len(batch["input_ids"]) // self._at_once) for batch in self._batches[: number + 1]]
        for index in layers:
            calls = iter(self._calls[sum(counts[:number]) :])
            hidden, left = self._run_batch(index, calls, hidden, left)
        return hidden

    def _run_part(
        self, index: int, call: RecordedCall, hidden: Tensor, before: Left, blocks: slice
    ) -> tuple[Tensor, Left]:
        """Outputs of a layer for blocks of a batch, and what it and layers before left beside them.

        Args:
            before: what those left, for the whole batch.
        """
        (args, kwargs), places = with_left(call.arguments[index], before, blocks)
        added = call.added.get(index)
        out = self._layers[index](hidden if added is None else added.to(hidden), *args, **kwargs)
        returned = left_returned(out, call.wanted[index], before, index, blocks)
        left = left_in(places, index, len(hidden)) | returned
        return out[0] if isinstance(out, tuple) else out, left

    def _give_fewer(self, index: int) -> None:
        fewer = self._at_once // 2
        warnings.warn(
            f"out of memory in decoder layer {index}: from here on, {fewer} instead of {self._at_once} "
            "calibration blocks per forward pass (batch_size)",
            stacklevel=3,
        )
        release_free_memory()
        self.limit(fewer)

    @property
    def at_once(self) -> int:
        """Blocks that a layer is given at once."""
        return self._at_once

    def limit(self, blocks: int) -> None:
        """Give layers so many blocks at once from here on."""
        self._at_once = blocks
        self._record()

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        return self._layers[index]

    @torch.no_grad()
    def head_inputs(self, outputs: list[Tensor] | None = None) -> list[Tensor]:
        """What the model makes of the outputs of its last layer, before its head.

        Args:
            outputs: of the first batches; default: ``hidden``, of all.
        """
        found = []
        given = self.hidden if outputs is None else outputs
        for batch, hidden in zip(self._batches, given, strict=False):
            parts = zip(pieces(batch, self._at_once), hidden.split(self._at_once), strict=True)
            found += [
                after_layers(self._model, self._layers, inputs, given, self._returns or 1)
                for inputs, given in parts
            ]
        return found

    def logits(self, outputs: list[Tensor]) -> Iterator[Tensor]:
        """Of the model if its last layer puts out ``outputs``, in parts of as many blocks as layers get."""
        for batch, hidden in zip(self._batches, outputs, strict=True):
            for part, given in zip(pieces(batch, self._at_once), hidden.split(self._at_once), strict=True):
                yield logits_after(self._model, self._layers, part, given, self._returns or 1)

    def take_embedded(self) -> list[Tensor]:
        """The inputs of the first layer, for those who keep them themselves; ``restart`` has none then."""
        embedded, self._embedded, self.hidden = self._embedded, [], []
        return embedded

    def restart(self) -> None:
        """Back to the inputs of the first layer."""
        self.hidden = self._embedded

    def advance(self, outputs: list[Tensor]) -> None:
        """Make ``outputs`` the inputs of the next layer."""
        self.hidden = outputs


def token_weights(inputs: list[Tensor], outputs: list[Tensor], weighting: str) -> Tensor:
    """What a squared error in a decoder layer's output costs at each token, ``[T]`` float32.

    By how many tokens its residual stream is seen (``seen_by``) over its mean square; by weighting "none",
    the same at all of them.

    Args:
        inputs, outputs: of the layer, ``[blocks, tokens, ..., H]``.
    """
    # Some families have several residual streams, [blocks, tokens, streams, H]: one token all the same.
    weights = residual_weights(torch.cat([out.flatten(0, 1).flatten(1).to(outputs[0]) for out in outputs]))
    if weighting == "none":
        alike = weights.reciprocal().nanmean().reciprocal().expand_as(weights)
        return alike.where(weights.isfinite(), weights)
    return weights * seen_by(inputs, outputs).to(weights.device)


def residual_weights(residual: Tensor) -> Tensor:
    """``[T]`` float32: 1 / mean square of the residual stream ``[T, hidden_size]``; NaN if that is infinite.

    Its reciprocal would be 0, and the token would silently not count.
    """
    squares = residual.float().square().mean(-1)
    return squares.clamp_min(1e-12).reciprocal().masked_fill(squares == torch.inf, torch.nan)


def capture_layer(
    forward: LayerwiseForward, index: int, experts: nn.Module, token_weighting: str
) -> tuple[LayerActivations, list[Tensor]]:
    """Run decoder layer ``index`` and record what its experts module is called with.

    Args:
        token_weighting: "residual" or "none".

    Returns:
        the activations, on the device of the experts' inputs, where the layer is quantized; and the layer's
        outputs (for ``forward.advance``).
    """
    seen: list[tuple[Tensor, ...]] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, top_k_index, top_k_weights = routed_inputs(experts, [*args, *kwargs.values()])
        # Copies, because a model may go on to change what it passed in place.
        captured = (hidden.detach(), top_k_index, top_k_weights.float())
        seen.append(tuple(tensor.clone() for tensor in captured))

    handle = experts.register_forward_pre_hook(record, with_kwargs=True)
    try:
        outputs = forward.run(index, again=seen.clear)
    finally:
        handle.remove()
    weights = token_weights(forward.hidden, outputs, token_weighting).to(seen[0][0].device)
    hidden, top_k_index, top_k_weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return LayerActivations(hidden, top_k_index, top_k_weights, weights), outputs
