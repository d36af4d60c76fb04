"""Memory and time of ``quantize --tune``, estimated from sizes alone; nothing large was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings

if TYPE_CHECKING:
    from bitsmoe_plugin.commands.estimate_resources import Workload

_KEPT_VALUES = 24
"""Values in float32 per token, layer and hidden feature that wait for the backward pass."""
_SECONDS_PER_DECODED = 3e-8
"""Of a weight of the experts, in plain torch, one core: what is left of a step of the bundled model without
its matrix products."""


def tuning_memory(work: Workload, config: BitsMoEConfig, process: int) -> dict[str, int]:
    """Bytes while both models are in memory, by part.

    ``model``: what is no expert, of both. ``experts``: the unquantized ones. ``packed``: those in few bits.
    ``layer``: the decoded rows of one layer with their gradients, float32. ``activations``: of a step's
    tokens, without logits.
    """
    weights = [shape.weights for shape in work.shapes]
    bits = config.bits if config.factor_bits is None else config.factor_bits
    tokens = TuningSettings().batch_size * config.sequence_length
    hidden = max(shape.hidden_size for shape in work.shapes)
    return {
        "process": process,
        "model": 2 * work.other_bytes,
        "experts": work.itemsize * sum(weights),
        "packed": int(bits * sum(weights) / 8),
        "layer": 2 * 4 * max(weights),
        "activations": 4 * _KEPT_VALUES * tokens * hidden * len(work.shapes),
    }


def tuning_flops(work: Workload, config: BitsMoEConfig) -> int:
    """Multiplications and additions in matrix products of all epochs.

    Per token: dense weights once in the reference, and forwards and twice backwards in the packed model; of
    experts, there forwards twice. Nothing for the text held out, which is little.
    """
    chosen = work.experts_per_token or 0
    experts = sum(chosen * shape.weights // shape.num_experts for shape in work.shapes)
    bases = sum(2 * shape.hidden_size**2 for shape in work.shapes)
    return config.tune * work.tokens * 2 * (4 * work.active_weights + 5 * experts + 4 * bases)


def tuning_decoding(work: Workload, config: BitsMoEConfig) -> float:
    """Seconds of one core for decoding, twice in every step."""
    steps = config.tune * -(-work.tokens // (TuningSettings().batch_size * config.sequence_length))
    return 2 * _SECONDS_PER_DECODED * steps * sum(shape.weights for shape in work.shapes)
