"""Tuning of a packed model in the way that was chosen: layer by layer, through the whole model, or both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bitsmoe_plugin.base.free_memory import release_free_memory
from bitsmoe_plugin.base.interruption import deferred_interrupt
from bitsmoe_plugin.base.work_directory import WorkDirectory
from bitsmoe_plugin.pipeline.tune_layers import Original, tune_layers
from bitsmoe_plugin.pipeline.tune_scales import Tuning, tune
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings


def tune_by(
    settings: TuningSettings,
    model: Any,
    blocks: Tensor,
    *,
    original: Callable[[], Original],
    reference: Callable[[], nn.Module],
    directory: Callable[[], WorkDirectory],
) -> Tuning:
    """Tune a packed model in place, by ``settings.through``, which is not "auto" any more.

    Args:
        original: loads what was quantized, its experts on disk.
        reference: the same, whole, on the device of the model; and takes the model there.
        directory: opens that of ``tune_layers``.

    Returns:
        what came of it; of both ways, ``before`` is before the first and ``after`` is after the last.

    Raises:
        QuantizationError, Interrupted: see ``tune_layers`` and ``tune_scales.tune``.
    """
    if settings.through == "model":
        return tune(model, reference(), blocks, settings)
    with deferred_interrupt() as stop:
        first = tune_layers(model, original(), blocks, settings, directory(), stop)
    release_free_memory()
    if settings.through == "layers":
        return first
    last = tune(model, reference(), blocks, settings)
    if not last.epoch or not first.epoch:
        return last if last.epoch else first
    result = replace(last, before=first.before, through="both")
    config = copy.copy(model.config.quantization_config)
    config.calibration["tuning"] = result.noted()
    model.config.quantization_config = config
    return result
