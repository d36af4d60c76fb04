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
from bitsmoe_plugin.pipeline.descent_progress import DescentProgress, check_way
from bitsmoe_plugin.pipeline.run_identity import pass_identity
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
    directory: WorkDirectory,
    lasting: bool = True,
) -> Tuning:
    """Tune a packed model in place, by ``settings.through``, which is not "auto" any more.

    Args:
        original: loads what was quantized, its experts on disk.
        reference: the same, whole, on the device of the model; and takes the model there.
        directory: where finished layers are kept, and steps through the whole model; an earlier call with the
            same arguments is continued.
        lasting: whether ``directory`` can be given to a later call.

    Returns:
        what came of it; of both ways, ``before`` is before the first and ``after`` is after the last.

    Raises:
        QuantizationError, Interrupted: see ``tune_layers`` and ``tune_scales.tune``.
    """
    check_way(directory, settings.through)
    if settings.through == "model":
        return _tune_whole(settings, model, reference(), blocks, directory if lasting else None)
    with deferred_interrupt() as stop:
        first = tune_layers(model, original(), blocks, settings, directory, stop)
    release_free_memory()
    if settings.through == "layers":
        return first
    last = _tune_whole(settings, model, reference(), blocks, directory if lasting else None)
    if not last.epoch or not first.epoch:
        return last if last.epoch else first
    result = replace(last, before=first.before, through="both")
    config = copy.copy(model.config.quantization_config)
    config.calibration["tuning"] = result.noted()
    model.config.quantization_config = config
    return result


def _tune_whole(
    settings: TuningSettings,
    model: Any,
    reference: nn.Module,
    blocks: Tensor,
    directory: WorkDirectory | None,
) -> Tuning:
    """Through the whole model; goes on where the directory, if there is one, says that it ended."""
    if directory is None:
        return tune(model, reference, blocks, settings)
    with deferred_interrupt("step") as stop:
        identity = pass_identity(model, reference, blocks, settings)
        progress = DescentProgress(directory, identity, settings.through, stop)
        return tune(model, reference, blocks, settings, progress)
