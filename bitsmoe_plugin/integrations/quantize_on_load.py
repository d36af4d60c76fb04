"""Where ``from_pretrained`` with a ``BitsMoEConfig`` takes experts from, and what it leaves out."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.expert_source import ExpertSource, LoadedExperts
from bitsmoe_plugin.models.stored_names import StoredNames, describe_left_out, without_module
from bitsmoe_plugin.models.streamed_experts import StreamedExperts, can_stream
from bitsmoe_plugin.pipeline.dense_pass import planned_dense
from bitsmoe_plugin.pipeline.size_budget import whole_budget


def planned_source(
    model: nn.Module,
    files: list[str],
    config: BitsMoEConfig,
    quantizer: Any = None,
    carried_bytes: int = 0,
) -> ExpertSource:
    """Where the experts' weights will come from, for a model that is not loaded yet.

    Args:
        quantizer: of transformers, if the files are in low precision.
        carried_bytes: see ``quantize_model``.

    Raises:
        QuantizationError: the budget is too small.
        ConfigError: see ``planned_dense``.
    """
    source = source_of_files(model, files, quantizer)
    whole_budget(model, source, config, carried_bytes)
    planned_dense(model, source.layers, config)
    return source


def source_of_files(model: nn.Module, files: list[str], quantizer: Any = None) -> ExpertSource:
    """Where they will come from: files, if they can be read in parts; a warning says so if not."""
    if files and can_stream(files):
        return StreamedExperts(model, files, quantizer)
    warnings.warn(
        "the model is not loaded from safetensors files, so all of it is in memory while it is quantized",
        stacklevel=3,
    )
    return LoadedExperts(model)


def tell_left_out(model: Any, names: StoredNames, files: list[str]) -> None:
    """Warn of what the files hold and the model does not load, once all rules are known that names were
    read by."""
    names.use_rules_of(model)
    _, left_out = without_module(names, files)
    if left_out:
        warnings.warn(describe_left_out(type(model).__name__, left_out), stacklevel=2)


def loaded_source(model: nn.Module, planned: ExpertSource | None) -> ExpertSource:
    """Where they come from once it is loaded; without a plan, from the model itself."""
    source = planned or LoadedExperts(model)
    if isinstance(source, StreamedExperts):
        source.model_is_loaded()
    return source
