"""How far predictions are from a reference's, token by token, in the terms of the field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Divergence:
    """Over all scored tokens.

    Attributes:
        kl_divergence: mean of KL(reference || model) in nats.
        kl_median, kl_99, kl_999: its median and the values that 99 and 99.9 % of the tokens do not exceed,
            interpolated between the nearest two.
        top1_agreement: share of tokens whose most likely token is the reference's.
        probability_change: root mean square of p_model - p_reference of the token that stands in the text
            (llama.cpp's "RMS delta p").
    """

    kl_divergence: float
    kl_median: float
    kl_99: float
    kl_999: float
    top1_agreement: float
    probability_change: float


class TokenDivergences:
    """Collects what ``Divergence`` is computed from: a float32 number per token, whatever the vocabulary."""

    def __init__(self) -> None:
        self._divergences: list[np.ndarray] = []
        self._agreeing = 0
        self._squares = 0.0

    def add(self, log_probs: Tensor, wanted: Tensor, tokens: Tensor) -> None:
        """
        Args:
            log_probs: of the model, ``[..., vocabulary]`` float32.
            wanted: of the reference, likewise.
            tokens: those that stand in the text, ``[...]`` int64.
        """
        each = functional.kl_div(log_probs, wanted, reduction="none", log_target=True).sum(-1)
        self._divergences.append(each.flatten().cpu().numpy())
        self._agreeing += int((log_probs.argmax(-1) == wanted.argmax(-1)).sum())
        ours, theirs = (x.gather(-1, tokens[..., None]).double().exp() for x in (log_probs, wanted))
        self._squares += float((ours - theirs).square().sum())

    def are_finite(self) -> bool:
        """Whether all divergences so far are."""
        return all(np.isfinite(part).all() for part in self._divergences)

    def result(self) -> Divergence:
        """Of at least one token."""
        values = np.concatenate(self._divergences).astype(np.float64)
        median, most, nearly_all = np.quantile(values, (0.5, 0.99, 0.999))
        return Divergence(
            kl_divergence=float(values.mean()),
            kl_median=float(median),
            kl_99=float(most),
            kl_999=float(nearly_all),
            top1_agreement=self._agreeing / len(values),
            probability_change=float(np.sqrt(self._squares / len(values))),
        )
