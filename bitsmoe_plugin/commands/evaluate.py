"""Quality of a model on text: perplexity by domain, and divergence from a reference model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from bitsmoe_plugin.base.error_lines import working_on
from bitsmoe_plugin.base.option_checks import check_number
from bitsmoe_plugin.calibration.documents import DEFAULT_TOKENS, Documents, load_documents
from bitsmoe_plugin.calibration.text import check_vocabulary, joined_documents
from bitsmoe_plugin.commands.defaults import BLOCK
from bitsmoe_plugin.commands.divergence import TokenDivergences
from bitsmoe_plugin.commands.routing import RoutingComparison
from bitsmoe_plugin.errors import ConfigError, QuantizationError
from bitsmoe_plugin.models.model_class import load_model, text_model
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class EvaluationText:
    """Attributes:
    domain: name of the domain ("all" where the data names none).
    blocks: ``[blocks, sequence_length]`` int64.
    scored: how many tokens at the end of each block are scored; None: all but the first, which has
        nothing before it.
    """

    domain: str
    blocks: Tensor
    scored: int | None = None


@dataclass
class _Sums:
    """Running sums over predicted tokens."""

    loss: float = 0.0
    tokens: int = 0

    def add(self, other: _Sums) -> None:
        self.loss += other.loss
        self.tokens += other.tokens


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    perplexity: exp of the mean negative log-likelihood over all predicted tokens.
    tokens: number of predicted tokens.
    per_domain: perplexity of each domain.
    kl_divergence, kl_median, kl_99, kl_999, top1_agreement, probability_change: see ``Divergence``; None
        without a reference.
    routing_change: share of tokens, over all layers, for which another set of experts than the reference's
        is selected; None likewise, or where it is not known.
    routing_change_by_layer: the same by path of the experts module.
    routing_unknown: why it is not known.
    """

    perplexity: float
    tokens: int
    per_domain: dict[str, float] = field(default_factory=dict)
    kl_divergence: float | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    kl_999: float | None = None
    top1_agreement: float | None = None
    probability_change: float | None = None
    routing_change: float | None = None
    routing_change_by_layer: dict[str, float] | None = None
    routing_unknown: str | None = None


def as_record(
    result: Evaluation,
    dataset: str,
    *,
    sequence_length: int = BLOCK,
    stride: int | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """What was measured, and on what, JSON-ready: of directories and files only the names are told."""
    settings = {
        "dataset": Path(dataset).name,
        "sequence_length": sequence_length,
        "stride": stride,
        "reference": Path(reference).name if reference and Path(reference).exists() else reference,
    }
    return {name: value for name, value in {**settings, **asdict(result)}.items() if value is not None}


def evaluation_text(
    dataset: Any,
    tokenizer: Any,
    *,
    sequence_length: int,
    max_tokens: int | None,
    stride: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[EvaluationText]:
    """Blocks of tokens per domain (field ``domain`` of a .jsonl file); for datasets see ``load_documents``.

    Documents of a domain are joined and cut into non-overlapping blocks, in which each token but
    the first is predicted; or with ``stride`` into overlapping ones, see ``_strided``. ``max_tokens`` is
    shared over the domains in proportion to their size.

    Raises:
        ConfigError: see ``check_evaluation``, or a stream without ``max_tokens``.
        QuantizationError: no domain fills one block.
    """
    check_evaluation(sequence_length, max_tokens, stride)
    options = {"max_tokens": max_tokens or DEFAULT_TOKENS, "sequence_length": sequence_length}
    documents = load_documents(dataset, **options)
    if documents.is_stream and max_tokens is None:
        raise ConfigError("the evaluation text is a stream, which may have no end; give max_tokens")
    streams = _streams(documents, tokenizer, max_tokens, chat_template_kwargs)
    total = sum(len(stream) for stream in streams.values())
    share = 1.0 if max_tokens is None else min(1.0, max_tokens / max(total, 1))
    texts = []
    for name, stream in streams.items():
        blocks = int(len(stream) * share) // sequence_length
        if blocks and stride is not None:
            texts += _strided(name, torch.tensor(stream[: int(len(stream) * share)]), sequence_length, stride)
        elif blocks:
            tokens = torch.tensor(stream[: blocks * sequence_length]).view(blocks, sequence_length)
            texts.append(EvaluationText(name, tokens))
    if not texts:
        raise QuantizationError(
            f"evaluation text has {total} tokens, too few for one block of {sequence_length} in any domain"
        )
    return texts


def _streams(
    documents: Documents, tokenizer: Any, max_tokens: int | None, chat_template_kwargs: dict[str, Any] | None
) -> dict[str, list[int]]:
    """Domain -> the tokens of its documents."""
    streams: dict[str, list[int]] = {}
    total = 0
    for index, tokens in enumerate(joined_documents(documents, tokenizer, chat_template_kwargs)):
        streams.setdefault(documents.domains[index] if documents.domains else "all", []).extend(tokens)
        total += len(tokens)
        if index + 1 == len(documents) and max_tokens is not None and total < max_tokens:
            documents.read_more()  # the loop goes on with what it adds
    return dict(sorted(streams.items()))


def check_evaluation(
    sequence_length: int, max_tokens: int | None, stride: int | None, batch_size: int = 1
) -> None:
    """Refuse numbers that no text can be evaluated with.

    Raises:
        ConfigError: fewer than 2 tokens in a block, which predict nothing, fewer than 1 in all or 1 block at
            once, or a stride that is not from 1 to ``sequence_length``.
    """
    check_number("sequence_length", sequence_length, 2, 10**7, whole=True, owner="evaluation")
    check_number("batch_size", batch_size, 1, 10**6, whole=True, owner="evaluation")
    if max_tokens is not None:
        check_number("max_tokens", max_tokens, 1, 10**12, whole=True, owner="evaluation")
    if stride is not None and not 1 <= stride <= sequence_length:
        raise ConfigError(
            f"stride={stride} is not allowed; allowed: from 1 to the sequence length, {sequence_length}"
        )


def _strided(domain: str, tokens: Tensor, length: int, stride: int) -> list[EvaluationText]:
    """Windows of ``length`` tokens, each ``stride`` after the last, that score what no earlier one saw.

    As in transformers' guide to the perplexity of models of fixed length: a scored token has at least
    ``length - stride`` tokens before it, and the end of the text is scored too.

    Args:
        tokens: ``[tokens]``, at least ``length``.
    """
    windows = tokens.unfold(0, length, stride)
    # A window as long as its stride begins with a token that has nothing before it.
    new = min(stride, length - 1)
    texts = [EvaluationText(domain, windows[:1]), EvaluationText(domain, windows[1:], new)]
    seen = length + stride * (len(windows) - 1)
    rest = tokens[stride * len(windows) :]
    texts.append(EvaluationText(domain, rest[None], min(len(tokens) - seen, len(rest) - 1)))
    return [text for text in texts if len(text.blocks) and text.scored != 0 and text.blocks.shape[1] > 1]


def _log_probs(model: nn.Module, batch: Tensor, scored: int) -> Tensor:
    """Of the last tokens, ``[batch, scored, vocabulary]``; softmax in float32."""
    logits = text_model(model)(input_ids=batch, use_cache=False).logits[:, -1 - scored : -1]
    return logits.float().log_softmax(-1)


class _Reference:
    """The model that another is compared with, and what is told of both."""

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        self._reference = reference
        self.divergences = TokenDivergences()
        self.routing = RoutingComparison(model, reference)

    def compare(self, batch: Tensor, scored: int, log_probs: Tensor) -> None:
        """Take in a batch ``[batch, length]`` for which the model has just given ``log_probs``."""
        wanted = _log_probs(self._reference, batch, scored)
        self.divergences.add(log_probs, wanted, batch[:, -scored:])
        self.routing.add(batch.shape[0], batch.shape[1], scored)

    def result(self) -> dict[str, Any]:
        """Fields of ``Evaluation``."""
        return {
            **asdict(self.divergences.result()),
            "routing_change": self.routing.overall(),
            "routing_change_by_layer": self.routing.by_layer(),
            "routing_unknown": self.routing.unknown,
        }


def _score(batch: Tensor, scored: int, model: nn.Module, compared: _Reference | None) -> _Sums:
    log_probs = _log_probs(model, batch, scored)
    loss = -log_probs.gather(-1, batch[:, -scored:, None]).double().sum()
    if compared is not None:
        compared.compare(batch, scored, log_probs)
    return _Sums(loss=float(loss), tokens=batch[:, -scored:].numel())


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    texts: Iterable[EvaluationText],
    *,
    reference: nn.Module | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Perplexity of ``model`` and, if given, divergence from ``reference``. Softmax in float32.

    Raises:
        QuantizationError: a perplexity that is not finite.
    """
    check_number("batch_size", batch_size, 1, 10**6, whole=True, owner="evaluation")
    total = _Sums()
    batches = [(text, batch) for text in texts for batch in text.blocks.split(batch_size)]
    domains: dict[str, _Sums] = {}
    device = next(model.parameters()).device
    compared = _Reference(model, reference) if reference is not None else None
    with compared.routing.recording() if compared else nullcontext():
        for text, batch in logging.tqdm(batches, desc="Evaluating"):
            scored = batch.shape[1] - 1 if text.scored is None else text.scored
            sums = _score(batch.to(device), scored, model, compared)
            domains.setdefault(text.domain, _Sums()).add(sums)
            total.add(sums)
    if not math.isfinite(total.loss) or not (compared is None or compared.divergences.are_finite()):
        dtype = next(model.parameters()).dtype
        raise QuantizationError(
            f"the model's outputs are not finite, so it has no perplexity; it was evaluated in {dtype}. If "
            'that is float16, its activations may be too large: set "dtype" in config.json to float32'
        )
    return Evaluation(
        perplexity=math.exp(total.loss / total.tokens),
        tokens=total.tokens,
        per_domain={name: math.exp(sums.loss / sums.tokens) for name, sums in domains.items()},
        **(compared.result() if compared else {}),
    )


def load_for_evaluation(model: str | ModelSource, device: torch.device | str = "cpu") -> Any:
    """A saved model, packed, of GPTQ or not quantized, in the dtype that it was saved in."""
    from bitsmoe_plugin.commands.compare.gptq_checkpoint import is_gptq, load_gptq_model

    source = ModelSource.of(model)
    with working_on(f"loading {source.name}"):
        loaded = load_gptq_model(source.name) if is_gptq(source.name) else load_model(source)
        return loaded.eval().to(device)


def load_reference(path: str | ModelSource, model: Any) -> Any:
    """The model that ``model`` is to be compared with, on the same device.

    Raises:
        ConfigError: its vocabulary is another.
    """
    reference = load_for_evaluation(path, next(model.parameters()).device)
    check_same_vocabulary(reference, model, path)
    return reference


def check_same_vocabulary(reference: Any, model: Any, path: str | ModelSource) -> None:
    """Refuse to compare a model with one of another vocabulary.

    Raises:
        ConfigError: naming both sizes.
    """
    sizes = [m.get_output_embeddings().weight.shape[0] for m in (reference, model)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"reference {ModelSource.of(path).name} has {sizes[0]} tokens in its vocabulary and the "
            f"evaluated model {sizes[1]}; give the model that was quantized"
        )


def evaluate_text(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    *,
    sequence_length: int = BLOCK,
    max_tokens: int | None = None,
    stride: int | None = None,
    reference: str | ModelSource | None = None,
    batch_size: int = 8,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Evaluation:
    """Perplexity of a loaded model on text and, if given, divergence from a saved reference model.

    Args:
        dataset: see ``load_documents``; of a stream no more is read than ``max_tokens`` needs.
        reference: directory or hub name of the full-precision model.
        chat_template_kwargs: arguments for the chat template, where documents are conversations.

    Raises:
        ConfigError: a stride that is not allowed, or a reference with another vocabulary.
        QuantizationError: too little text, or ids outside the vocabulary.
    """
    texts = evaluation_text(
        dataset,
        tokenizer,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        stride=stride,
        chat_template_kwargs=chat_template_kwargs,
    )
    for text in texts:
        check_vocabulary(text.blocks, model.get_input_embeddings().num_embeddings)
    other = load_reference(reference, model) if reference is not None else None
    return evaluate_model(model, texts, reference=other, batch_size=batch_size)


def evaluate_path(model: str | ModelSource, dataset: Any, device: str = "cpu", **options: Any) -> Evaluation:
    """``evaluate_text`` for a saved model, packed, of GPTQ or not quantized, with its own tokenizer."""
    return evaluate_text(load_for_evaluation(model, device), load_tokenizer(model), dataset, **options)
