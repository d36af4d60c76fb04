"""Calibration text -> blocks of tokens -> what each MoE layer sees of them.

The model is walked one decoder layer at a time: the hidden states of all blocks go through layer
n, then through layer n + 1. Only one layer's inputs are alive at any moment, and a layer that has
been quantized meanwhile passes its real outputs on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.families import routed_inputs
from bitsmoe_plugin.memory import release_free_memory
from bitsmoe_plugin.statistics import LayerActivations

Tokenizer = Callable[..., Any]


def load_documents(dataset: Any) -> list[str] | list[list[int]]:
    """Documents of any accepted dataset.

    Args:
        dataset: list of strings, list of token id lists, a ``datasets`` dataset with a column
            ``text`` (or ``input_ids``), or a path to a .txt (one document) or .jsonl file (one
            object with a field ``text`` per line).

    Raises:
        QuantizationError: of another type, unreadable, or empty.
    """
    if isinstance(dataset, (str, Path)):
        documents = _read_file(Path(dataset))
    elif hasattr(dataset, "column_names"):
        documents = _read_columns(dataset)
    elif isinstance(dataset, Sequence):
        documents = [d.tolist() if hasattr(d, "tolist") else d for d in dataset]
    else:
        raise QuantizationError(
            f"dataset is a {type(dataset).__name__}; allowed: list of strings, list of token id "
            "lists, a datasets.Dataset, or a path to a .txt or .jsonl file"
        )
    if not documents:
        raise QuantizationError("dataset is empty; give at least some thousand tokens of text")
    texts = all(isinstance(d, str) for d in documents)
    ids = all(isinstance(d, (list, tuple)) and all(isinstance(i, int) for i in d) for d in documents)
    if not texts and not ids:
        raise QuantizationError(
            "dataset mixes types or holds something else than strings or lists of token ids"
        )
    return documents


def _read_columns(dataset: Any) -> list[Any]:
    """Documents of a ``datasets`` dataset, streamed or not."""
    rows = list(dataset)
    columns = list(rows[0]) if rows else []
    column = next((c for c in ("text", "input_ids") if c in columns), None)
    if rows and column is None:
        raise QuantizationError(
            f"dataset has the columns {columns}; one named 'text' or 'input_ids' is needed"
        )
    return [row[column] for row in rows]


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise QuantizationError(f"dataset file {path} does not exist; give a .txt or .jsonl file")
    text = _read_text(path)
    if path.suffix == ".txt":
        return [text] if text.strip() else []
    if path.suffix != ".jsonl":
        raise QuantizationError(f"dataset file {path}: allowed are .txt and .jsonl files")
    return [row["text"] for row in read_jsonl(path)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuantizationError(f"{path} is not UTF-8 text ({error})") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file, each an object with a string field ``text``.

    Raises:
        QuantizationError: naming the line that is not such an object.
    """
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise QuantizationError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise QuantizationError(f"{path}, line {number}: an object with a string 'text' is needed")
        rows.append(row)
    return rows


def token_stream(documents: Iterable[Any], tokenizer: Any, limit: int | None = None) -> list[int]:
    """All documents as one list of token ids, joined with the end-of-text token.

    Args:
        documents: strings or token id lists.
        tokenizer: of transformers; needed for strings, otherwise only for its ``eos_token_id``.
        limit: stop after this many tokens.
    """
    stream: list[int] = []
    eos = getattr(tokenizer, "eos_token_id", None)
    for document in documents:
        if isinstance(document, str):
            if tokenizer is None:
                raise QuantizationError("dataset holds text, but there is no tokenizer to read it with")
            document = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        stream.extend(document)
        if eos is not None:
            stream.append(eos)
        if limit is not None and len(stream) >= limit:
            return stream[:limit]
    return stream


def _sampled(documents: Sequence[Any], tokenizer: Any, length: int, limit: int, seed: int) -> list[int]:
    """At most ``limit`` tokens from as many documents as it takes: a random piece of up to ``length``
    tokens of each, in random order, and the other pieces only if that is not enough; all in order if
    all fits.

    Text from few documents is too much alike: on SmolLM2 cut into experts, at 2 bits and with 9,216
    tokens, the perplexity was 2.37 times that of full precision with the file's first tokens, 2.05 times
    with tokens of many documents.
    """
    random = Random(seed)
    order = list(range(len(documents)))
    random.shuffle(order)
    stream: list[int] = []
    spare: list[list[int]] = []
    read: dict[int, list[int]] = {}
    for index in order:
        tokens = read[index] = token_stream([documents[index]], tokenizer)
        pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        random.shuffle(pieces)
        stream.extend(pieces[0] if pieces else [])
        spare.extend(pieces[1:])
        if len(stream) >= limit:
            return stream[:limit]
    if sum(map(len, read.values())) <= limit:
        return [token for index in sorted(read) for token in read[index]]
    random.shuffle(spare)
    for piece in spare:
        stream.extend(piece)
    return stream[:limit]


def token_blocks(
    documents: Sequence[Any],
    tokenizer: Any,
    *,
    sequence_length: int,
    max_tokens: int,
    vocab_size: int,
    seed: int = 0,
) -> Tensor:
    """Blocks of equal length cut from joined pieces of the documents; the remainder is dropped.

    Args:
        seed: of the choice of pieces, if there is more text than is used.

    Returns:
        ``[blocks, sequence_length]`` int64 with at most ``max_tokens`` tokens, but at least one block.

    Raises:
        QuantizationError: less than one block, or ids outside the vocabulary.
    """
    stream = _sampled(documents, tokenizer, sequence_length, max(max_tokens, sequence_length), seed)
    blocks = len(stream) // sequence_length
    if blocks == 0:
        raise QuantizationError(
            f"dataset has {len(stream)} tokens, fewer than one sequence of {sequence_length}; "
            "give more text or a smaller sequence_length"
        )
    tokens = torch.tensor(stream[: blocks * sequence_length]).view(blocks, sequence_length)
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        wrong = int(tokens.min() if int(tokens.min()) < 0 else tokens.max())
        raise QuantizationError(
            f"dataset holds token id {wrong}, but the vocabulary ends at {vocab_size - 1}; "
            "was it tokenized for another model?"
        )
    return tokens


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments of each call and computes nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.inputs: list[Tensor] = []
        self._layer = [layer]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        self.inputs.append(hidden)
        return hidden


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
            # Contiguous, as hidden states are when they are read from a file: see ``saved_progress``.
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
