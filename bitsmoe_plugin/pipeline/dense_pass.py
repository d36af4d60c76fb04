"""Second pass, its other part: linear layers of a decoder layer are rounded before its experts.

They are fitted to what the quantized layers before put out, and experts to what these put out then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.base.linalg import weighted_products
from bitsmoe_plugin.calibration.dense_inputs import input_moments
from bitsmoe_plugin.calibration.layerwise_forward import token_weights
from bitsmoe_plugin.codec.dense import DenseScheme
from bitsmoe_plugin.models.dense_layers import planned_schemes, saved_names
from bitsmoe_plugin.models.dense_units import NO_LAYER
from bitsmoe_plugin.models.families import MoELayer
from bitsmoe_plugin.pipeline.progress import Hidden
from bitsmoe_plugin.pipeline.run import Run, finite
from bitsmoe_plugin.rounding.dense_rounding import round_linear
from bitsmoe_plugin.runtime.dense_linear import check_library, pack, put
from bitsmoe_plugin.spectral.error_feedback import damping


def planned_dense(model: Any, layers: list[MoELayer], config: Any) -> dict[int, dict[str, DenseScheme]]:
    """``Run.dense`` of a model.

    Raises:
        ConfigError: see ``planned_schemes`` and ``saved_names``; or the library is missing.
    """
    schemes = planned_schemes(model, layers, config)
    if schemes:
        check_library()
        saved_names(model, list(schemes))
    decoder = layers[0].layer_name.rpartition(".")[0] + "."
    found: dict[int, dict[str, DenseScheme]] = {}
    for name, scheme in schemes.items():
        inside = name.startswith(decoder)
        index = int(name.removeprefix(decoder).partition(".")[0]) if inside else NO_LAYER
        found.setdefault(index, {})[name] = scheme
    return found


def round_dense(run: Run, index: int, inputs: Hidden, exact: Hidden) -> dict[str, Tensor]:
    """Round and replace linear layers of a decoder layer.

    Args:
        inputs, exact: inputs and outputs of the decoder layer in the unquantized model.

    Returns:
        their stored tensors by name, on the CPU; empty if all stay as they are.
    """
    schemes = run.dense.get(index, {})
    if not schemes:
        return {}
    modules = {name: run.model.get_submodule(name) for name in schemes}
    asked: dict[str, Any] = {name: module for name, module in modules.items() if schemes[name].bits < 8}
    moments: dict[str, Tensor] = {}
    if asked:
        weights = seen_tokens(run, inputs, finite(index, exact))
        moments = run.agreed(lambda: input_moments(run.forward, index, asked, weights))
    return _rounded(run, modules, schemes, moments)


def round_head(run: Run) -> None:
    """The same of the head, once all layers are rounded."""
    schemes = run.dense.get(NO_LAYER, {})
    modules = {name: run.model.get_submodule(name) for name in schemes}
    moments: dict[str, Tensor] = {}
    if any(scheme.bits < 8 for scheme in schemes.values()):
        total = run.agreed(lambda: head_moments(run, run.forward.head_inputs()))
        moments = dict.fromkeys(schemes, total)
    _rounded(run, modules, schemes, moments)


def head_moments(run: Run, given: list[Tensor]) -> Tensor:
    """``[H, H]`` float32, second moments of the head's inputs, without those that are held out."""
    total: Any = 0
    left = run.tokens
    for inputs in given:
        rows = inputs.flatten(0, -2)[:left].float()
        left -= len(rows)
        if len(rows):
            total = total + weighted_products(rows, rows, torch.ones(len(rows), device=rows.device))
    return total  # type: ignore[no-any-return]


def seen_tokens(run: Run, inputs: Hidden, outputs: Hidden) -> Tensor:
    """``token_weights`` of a decoder layer, as its experts have them; 0 for what is held out."""
    weights = token_weights(inputs, outputs, run.config.token_weighting)
    weights[run.tokens :] = 0
    return weights


def _rounded(
    run: Run,
    modules: Mapping[str, nn.Module],
    schemes: Mapping[str, DenseScheme],
    moments: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    def compute() -> dict[str, Tensor]:
        tensors = {}
        for name, module in modules.items():
            assert isinstance(module, nn.Linear)
            share = damping(run.config, run.tokens, module.in_features)
            given = moments.get(name), share, run.config.feedback
            rounded = round_linear(module.weight, schemes[name], *given)
            for part, tensor in pack(*rounded, schemes[name]).items():
                tensors[f"{name}.{part}"] = tensor.cpu().contiguous()
        return tensors

    tensors = run.workers.from_main(compute)
    put_dense(run, tensors)
    return tensors


def put_dense(run: Run, tensors: Mapping[str, Tensor]) -> None:
    """Put rounded linear layers in the place of unquantized ones.

    Args:
        tensors: from ``round_dense``.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        parts.setdefault(layer, {})[part] = tensor
    schemes = {name: scheme for layers in run.dense.values() for name, scheme in layers.items()}
    for layer, stored in parts.items():
        put(run.model.get_submodule(layer), stored, schemes[layer])  # type: ignore[arg-type]
