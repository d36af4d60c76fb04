"""Memory and time of tuning, estimated from sizes alone; nothing large was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings
from bitsmoe_plugin.pipeline.tuning_streams import CHUNK

if TYPE_CHECKING:
    from bitsmoe_plugin.commands.estimate_resources import Workload

_KEPT_VALUES = 24
"""Values in float32 per token, layer and hidden feature that wait for the backward pass."""
_LOGITS = 6
"""Times that logits of a step are in memory, float32: of both models, their logarithms and gradients."""
_CODES_BYTES = 40
"""Per weight whose codes are learnt: see ``TunableCodes``."""
_SECONDS_PER_DECODED = 3e-8
"""Of a weight of the experts, in plain torch, one core: what is left of a step of the bundled model without
its matrix products."""


def tuning_memory(
    work: Workload, config: BitsMoEConfig, process: int, settings: TuningSettings | None = None
) -> dict[str, int]:
    """Bytes at the peak of the way that takes most, of those that ``tune_through`` has."""
    settings = settings or TuningSettings(through=config.tune_through)
    layers = layers_memory(work, config, process, settings)
    return layers if settings.through == "layers" else model_memory(work, config, process, settings)


def layers_memory(
    work: Workload, config: BitsMoEConfig, process: int, settings: TuningSettings
) -> dict[str, int]:
    """Bytes while layers are tuned one by one, by part, as in ``model_memory``; hidden states are in files.

    ``experts``, ``packed``: of one layer. ``chunks``: hidden states at hand, in and out, of both models.
    """
    weights = max(shape.weights for shape in work.shapes)
    at_once = settings.layers_at_once
    tokens = settings.batch_size * config.sequence_length
    hidden = max(shape.hidden_size for shape in work.shapes)
    return {
        "process": process,
        "model": 2 * work.other_bytes,
        "experts": work.itemsize * weights,
        "packed": int(_bits(config) * at_once * weights / 8),
        "layer": 2 * 4 * weights,
        "activations": 4 * _KEPT_VALUES * tokens * hidden * at_once,
        "logits": 4 * _LOGITS * tokens * work.vocab_size,
        "chunks": 4 * work.itemsize * min(work.tokens, CHUNK) * hidden,
        "codes": _codes_bytes(at_once * weights, settings),
    }


def _bits(config: BitsMoEConfig) -> float:
    return config.bits if config.factor_bits is None else config.factor_bits


def model_memory(
    work: Workload, config: BitsMoEConfig, process: int, settings: TuningSettings
) -> dict[str, int]:
    """Bytes while both models are in memory, by part.

    ``model``: what is no expert, of both. ``experts``: the unquantized ones. ``packed``: those in few bits.
    ``layer``: the decoded rows of one layer with their gradients, float32. ``activations``: of a step's
    tokens. ``logits``: of the same.
    """
    weights = [shape.weights for shape in work.shapes]
    tokens = settings.batch_size * config.sequence_length
    hidden = max(shape.hidden_size for shape in work.shapes)
    return {
        "process": process,
        "model": 2 * work.other_bytes,
        "experts": work.itemsize * sum(weights),
        "packed": int(_bits(config) * sum(weights) / 8),
        "layer": 2 * 4 * max(weights),
        "activations": 4 * _KEPT_VALUES * tokens * hidden * len(work.shapes),
        "logits": 4 * _LOGITS * tokens * work.vocab_size,
        "codes": _codes_bytes(sum(weights), settings),
    }


def _codes_bytes(weights: int, settings: TuningSettings) -> int:
    return _CODES_BYTES * weights if "codes" in settings.learn else 0


def tuning_flops(work: Workload, config: BitsMoEConfig) -> int:
    """Multiplications and additions in matrix products of all epochs, of each way that is taken.

    Per token, through the whole model: dense weights once in the reference, and forwards and twice backwards
    in the packed model; of experts, there forwards twice. Layer by layer: dense weights forwards
    alone, and once more in both models. Nothing for the text held out, which is little.
    """
    chosen = work.experts_per_token or 0
    experts = sum(chosen * shape.weights // shape.num_experts for shape in work.shapes)
    bases = sum(2 * shape.hidden_size**2 for shape in work.shapes)
    model = 4 * work.active_weights + 5 * experts + 4 * bases
    per_epoch = work.active_weights + 4 * experts + 4 * bases
    once = 2 * work.active_weights + 2 * experts + bases  # what either model puts out
    weights = 0
    if config.tune_through != "layers":
        weights += config.tune * model
    if config.tune_through != "model":
        weights += once + config.tune * per_epoch
    return work.tokens * 2 * weights


def tuning_decoding(work: Workload, config: BitsMoEConfig) -> float:
    """Seconds of one core for decoding, twice in every step."""
    steps = config.tune * -(-work.tokens // (TuningSettings().batch_size * config.sequence_length))
    steps *= 1 if config.tune_through in ("layers", "model") else 2
    return 2 * _SECONDS_PER_DECODED * steps * sum(shape.weights for shape in work.shapes)
