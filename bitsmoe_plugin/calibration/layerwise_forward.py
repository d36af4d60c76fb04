"""Blocks of calibration tokens (``calibration.text``) -> what each MoE layer sees of them.

The model is walked one decoder layer at a time: the hidden states of all blocks go through layer
n, then through layer n + 1. Only one layer's inputs are alive at any moment, and a layer that has
been quantized meanwhile passes its real outputs on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.base.free_memory import release_free_memory
from bitsmoe_plugin.calibration.statistics import LayerActivations
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.families import routed_inputs


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments of each call and computes nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.inputs: list[Tensor] = []
        self.answers: Iterator[Tensor] | None = None  # instead of what it is given
        self._layer = [layer]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        self.inputs.append(hidden)
        return hidden if self.answers is None else next(self.answers)


@contextmanager
def _recording(layers: nn.ModuleList):  # type: ignore[no-untyped-def]
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Recorder(layer)
        yield list(layers)
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the machine had no more memory; only devices have an exception of their own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class LayerwiseForward:
    """Runs calibration blocks through a decoder one layer at a time.

    What each layer is called with besides the hidden states (masks, position embeddings) is taken
    from the model itself, by one pass in which the layers are replaced by recorders. A layer that runs out
    of memory, and those after it, are given fewer blocks at once; hidden states stay in batches of the size
    that was asked for.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, blocks: Tensor, batch_size: int):
        """
        Args:
            model: a transformers causal language model (its ``base_model`` is called).
            layers: its decoder layers.
            blocks: ``[blocks, sequence_length]`` int64.
            batch_size: blocks per forward pass.
        """
        self._model, self._layers = model, layers
        self._batches = blocks.split(batch_size)
        self._at_once = batch_size
        self._embedded = self._record()
        self.hidden = self._embedded

    def _record(self) -> list[Tensor]:
        """Set what the layers are called with, for as many blocks as they get at once; returns the first
        one's inputs."""
        base = getattr(self._model, "base_model", self._model)
        device = next(self._model.parameters()).device
        with torch.no_grad(), _recording(self._layers) as recorders:
            for batch in self._batches:
                for piece in batch.split(self._at_once):
                    base(input_ids=piece.to(device), use_cache=False)
        self._calls = [recorder.calls for recorder in recorders]
        return recorders[0].inputs

    def run(
        self, index: int, inputs: list[Tensor] | None = None, again: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """Outputs of layer ``index`` for every batch of ``inputs`` (default: ``hidden``), which stay.

        Args:
            again: called before the layer is run on all inputs once more, with fewer blocks at once.

        Raises:
            QuantizationError: out of memory with one block.
        """
        while True:
            try:
                return self._run(index, inputs or self.hidden)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if self._at_once == 1:
                    raise QuantizationError(
                        f"out of memory in decoder layer {index} with one block of "
                        f"{self._batches[0].shape[1]} tokens; use a smaller sequence_length or fewer "
                        "calibration_tokens"
                    ) from error
            # Out of the handler, so that what the layer had computed is free again.
            self._give_fewer(index)
            again()

    @torch.no_grad()
    def _run(self, index: int, inputs: list[Tensor]) -> list[Tensor]:
        calls = iter(self._calls[index])
        outputs = []
        for batch in inputs:
            pieces = []
            for hidden in batch.split(self._at_once):
                args, kwargs = next(calls)
                out = self._layers[index](hidden, *args, **kwargs)
                pieces.append(out[0] if isinstance(out, tuple) else out)
            # Contiguous, as hidden states are when they are read from a file: see ``progress_on_disk``.
            outputs.append(pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces))
        return outputs

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
    def head_inputs(self) -> list[Tensor]:
        """What the model makes of ``hidden``, the outputs of its last layer, before its head."""
        base = getattr(self._model, "base_model", self._model)
        device = next(self._model.parameters()).device
        found = []
        with _recording(self._layers) as recorders:
            recorders[-1].answers = (piece for batch in self.hidden for piece in batch.split(self._at_once))
            for batch in self._batches:
                for piece in batch.split(self._at_once):
                    found.append(base(input_ids=piece.to(device), use_cache=False).last_hidden_state)
        return found

    def restart(self) -> None:
        """Back to the inputs of the first layer."""
        self.hidden = self._embedded

    def advance(self, outputs: list[Tensor]) -> None:
        """Make ``outputs`` the inputs of the next layer."""
        self.hidden = outputs


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
    residual = torch.cat([out.flatten(0, -2).to(seen[0][0].device) for out in outputs])
    weights = residual_weights(residual)
    if token_weighting == "none":
        alike = torch.full_like(weights, float(1 / residual.float().square().mean()))
        weights = alike.where(weights.isfinite(), weights)
    hidden, top_k_index, top_k_weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return LayerActivations(hidden, top_k_index, top_k_weights, weights), outputs
