"""What fewer bits of the head cost, in the unit of rows and other linear layers.

Those cost what they change in the stream that a decoder layer puts out; the head puts out logits. Both are
taken to what they do to the model's distribution: a head in fewer bits costs as much as the noise at the end
of the last decoder layer that diverges as far from the unquantized model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from bitsmoe_plugin.calibration.carried import first_batches
from bitsmoe_plugin.models.dense_units import NO_LAYER
from bitsmoe_plugin.pipeline.dense_costs import DenseCosts, rounded_to
from bitsmoe_plugin.pipeline.dense_pass import head_moments
from bitsmoe_plugin.pipeline.noise import with_noise
from bitsmoe_plugin.pipeline.run import Run

_TOKENS = 1024
"""Divergences are measured on so many; moments see all."""
_ROWS = 128
"""Whose logits are in memory at once."""
_NOISE = 1e-3
"""Mean square of the noise, over that of the stream: small, so that the divergence is in proportion to it."""


def head_costs(run: Run) -> DenseCosts:
    """Of the head, once all decoder layers have put out ``run.forward.hidden``; empty if it is no unit."""
    units = [unit for unit in run.units if unit.layer == NO_LAYER]
    if not units:
        return []
    (unit,) = units
    (name,) = unit.names
    head: Any = run.model.get_submodule(name)
    sizes = [out.shape[0] * out.shape[1] for out in run.forward.hidden]
    count = next((n for n in range(1, len(sizes)) if sum(sizes[:n]) >= _TOKENS), len(sizes))
    few, tokens = first_batches(run.forward.hidden, count), min(_TOKENS, run.tokens)
    rows = _rows(run.forward.head_inputs(few), tokens)
    noisy = _rows(run.forward.head_inputs(with_noise(few, _NOISE, run.config.seed)), tokens)
    weight, bias = head.weight.data, head.bias
    of_noise = _divergence(rows, weight, bias, noisy - rows, weight)
    moments = {name: head_moments(run, run.forward.head_inputs())}
    costs = []
    for schemes in unit.schemes:
        with rounded_to(run, schemes, moments):
            error = head.weight.data - weight
        costs.append(_NOISE * _divergence(rows, weight, bias, rows, error) / max(of_noise, 1e-12))
    return [[*costs, 0.0]]


def _rows(inputs: list[Tensor], tokens: int) -> Tensor:
    return torch.cat([part.flatten(0, -2) for part in inputs])[:tokens]


def _divergence(rows: Tensor, weight: Tensor, bias: Tensor | None, changes: Tensor, by: Tensor) -> float:
    """Mean KL divergence of what a change of logits makes of a distribution.

    Args:
        rows: ``[tokens, H]``, of which the head ``weight`` makes the distribution.
        changes: ``[tokens, H]``, of which the weight ``by`` makes the change: small, and so not lost in the
            rounding of logits.
    """
    total = 0.0
    for given, changed in zip(rows.split(_ROWS), changes.split(_ROWS), strict=True):
        logits = linear(given, weight, bias).float()
        found = (logits + linear(changed, by).float()).log_softmax(-1)
        total += float(kl_div(found, logits.log_softmax(-1), reduction="sum", log_target=True))
    return total / len(rows)
