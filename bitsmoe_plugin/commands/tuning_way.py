"""Which way a model is tuned, by the memory that there is; told before work begins."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

from bitsmoe_plugin.base.free_memory import available_memory
from bitsmoe_plugin.base.sizes import readable_size
from bitsmoe_plugin.commands.estimate import workload_of
from bitsmoe_plugin.commands.estimate_resources import PROCESS_BYTES
from bitsmoe_plugin.commands.estimate_tuning import layers_memory, model_memory
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.model_class import empty_model
from bitsmoe_plugin.pipeline.tuning_settings import WAYS, TuningSettings


def settled(
    settings: TuningSettings,
    original: Any,
    config: BitsMoEConfig,
    tokens: int,
    device: Any,
    begun: str | None = None,
) -> TuningSettings:
    """Settings whose way is not "auto" any more; says which it is, and what memory it takes.

    Args:
        original: config, of transformers, of the model that was quantized.
        config: of the packed one, with the ``sequence_length`` of the text.
        tokens: of the text.
        begun: way of steps through the whole model that are kept; "auto" goes on with them, if it began them.
    """
    config = copy.copy(config)
    config.calibration_tokens = tokens
    work = workload_of(empty_model(original), config)
    layers, model = (
        sum(memory(work, config, PROCESS_BYTES, settings).values())
        for memory in (layers_memory, model_memory)
    )
    free = available_memory(device)
    way = settings.through
    if way == "auto":
        way = "both" if begun == "both" or free is None or model <= free else "layers"
    needed = layers if way == "layers" else max(layers, model) if way == "both" else model
    reason = "" if free is None else f", {readable_size(free)} are free"
    if settings.through == "auto" and way == "layers":
        reason += f", the whole model would take {readable_size(model)}"
    print(f"tuning {WAYS[way]}: about {readable_size(needed)} of memory{reason}", file=sys.stderr)
    return replace(settings, through=way)
