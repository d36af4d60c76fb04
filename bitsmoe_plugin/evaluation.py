"""Quality of a model on text: perplexity by domain, and divergence from a reference model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from bitsmoe_plugin.calibration import load_documents, read_jsonl, token_stream
from bitsmoe_plugin.errors import QuantizationError


@dataclass(frozen=True)
class EvaluationText:
    """Attributes:
    domain: name of the domain ("all" where the data names none).
    blocks: ``[blocks, sequence_length]`` int64.
    """

    domain: str
    blocks: Tensor


@dataclass
class _Sums:
    """Running sums over predicted tokens."""

    loss: float = 0.0
    divergence: float = 0.0
    agreement: float = 0.0
    tokens: int = 0

    def add(self, other: _Sums) -> None:
        self.loss += other.loss
        self.divergence += other.divergence
        self.agreement += other.agreement
        self.tokens += other.tokens


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    perplexity: exp of the mean negative log-likelihood over all predicted tokens.
    tokens: number of predicted tokens.
    per_domain: perplexity of each domain.
    kl_divergence: mean KL(reference || model) per token in nats; None without a reference.
    top1_agreement: share of tokens whose most likely token is the reference's; None likewise.
    """

    perplexity: float
    tokens: int
    per_domain: dict[str, float] = field(default_factory=dict)
    kl_divergence: float | None = None
    top1_agreement: float | None = None


def evaluation_text(
    dataset: Any, tokenizer: Any, *, sequence_length: int, max_tokens: int | None
) -> list[EvaluationText]:
    """Blocks of tokens per domain (field ``domain`` of a .jsonl file).

    Documents of a domain are joined and cut into non-overlapping blocks, in which each token but
    the first is predicted. ``max_tokens`` is shared over the domains in proportion to their size.

    Raises:
        QuantizationError: no domain fills one block.
    """
    by_domain: dict[str, list[Any]] = {}
    if isinstance(dataset, (str, Path)) and Path(dataset).suffix == ".jsonl" and Path(dataset).is_file():
        for row in read_jsonl(Path(dataset)):
            by_domain.setdefault(str(row.get("domain", "all")), []).append(row["text"])
    else:
        by_domain["all"] = list(load_documents(dataset))
    streams = {name: token_stream(docs, tokenizer) for name, docs in sorted(by_domain.items())}
    total = sum(len(stream) for stream in streams.values())
    share = 1.0 if max_tokens is None else min(1.0, max_tokens / max(total, 1))
    texts = []
    for name, stream in streams.items():
        blocks = int(len(stream) * share) // sequence_length
        if blocks:
            tokens = torch.tensor(stream[: blocks * sequence_length]).view(blocks, sequence_length)
            texts.append(EvaluationText(name, tokens))
    if not texts:
        raise QuantizationError(
            f"evaluation text has {total} tokens, too few for one block of {sequence_length} in any domain"
        )
    return texts


def _score(batch: Tensor, model: nn.Module, reference: nn.Module | None) -> _Sums:
    log_probs = model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    loss = -log_probs.gather(-1, batch[:, 1:, None]).double().sum()
    sums = _Sums(loss=float(loss), tokens=batch[:, 1:].numel())
    if reference is not None:
        wanted = reference(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        divergence = torch.nn.functional.kl_div(log_probs, wanted, reduction="sum", log_target=True)
        sums.divergence = float(divergence)
        sums.agreement = float((log_probs.argmax(-1) == wanted.argmax(-1)).sum())
    return sums


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    texts: Iterable[EvaluationText],
    *,
    reference: nn.Module | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Perplexity of ``model`` and, if given, divergence from ``reference``. Softmax in float32."""
    total = _Sums()
    batches = [(text.domain, batch) for text in texts for batch in text.blocks.split(batch_size)]
    domains: dict[str, _Sums] = {}
    device = next(model.parameters()).device
    for domain, batch in logging.tqdm(batches, desc="Evaluating"):
        sums = _score(batch.to(device), model, reference)
        domains.setdefault(domain, _Sums()).add(sums)
        total.add(sums)
    per_domain = {name: math.exp(sums.loss / sums.tokens) for name, sums in domains.items()}
    compared = reference is not None
    return Evaluation(
        perplexity=math.exp(total.loss / total.tokens),
        tokens=total.tokens,
        per_domain=per_domain,
        kl_divergence=total.divergence / total.tokens if compared else None,
        top1_agreement=total.agreement / total.tokens if compared else None,
    )


def evaluate_path(
    model: str,
    dataset: Any,
    *,
    sequence_length: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Perplexity of a saved model, packed, of GPTQ or not quantized, read with its own tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitsmoe_plugin.comparison.gptq_checkpoint import is_gptq, load_gptq_model

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = evaluation_text(dataset, tokenizer, sequence_length=sequence_length, max_tokens=max_tokens)
    load = load_gptq_model if is_gptq(model) else AutoModelForCausalLM.from_pretrained
    loaded = load(model).eval()
    return evaluate_model(loaded, texts, batch_size=batch_size)
