"""Second pass over the layers of a model: round and pack every layer, and put it in its place.

Each layer is fitted to what the quantized layers before it put out (``sequential``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.allocation.row_widths import Widths, experts_with_rows
from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.calibration.carried import copied
from bitsmoe_plugin.calibration.coverage import refuse_thin_calibration, tokens_per_expert
from bitsmoe_plugin.calibration.layerwise_forward import capture_layer
from bitsmoe_plugin.calibration.post_norm import through_norm
from bitsmoe_plugin.calibration.residual_gain import measured_passage
from bitsmoe_plugin.checkpoint.energy_summary import spectrum
from bitsmoe_plugin.checkpoint.manifest import entry_spec, layer_manifest
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.families import MoELayer, apply_gating, layer_shape, read_biases
from bitsmoe_plugin.pipeline.dense_pass import put_dense, round_dense, round_head
from bitsmoe_plugin.pipeline.layer_plan import LayerPlan, bits_over_bound
from bitsmoe_plugin.pipeline.progress import Hidden, PackedLayer
from bitsmoe_plugin.pipeline.run import Run, finite
from bitsmoe_plugin.rounding.layer_rounding import round_layer
from bitsmoe_plugin.rounding.originals import with_originals
from bitsmoe_plugin.rounding.round_from_plan import round_as_planned
from bitsmoe_plugin.runtime.experts import BitsMoEExperts, replace_module
from bitsmoe_plugin.spectral.layer_problem import build_problem


def round_layers(run: Run, widths: Widths) -> dict[str, dict[str, Any]]:
    """Second pass: round and replace the experts of every layer.

    Returns:
        the entry of each MoE layer in ``BitsMoEConfig.layers``, by its name.
    """
    workers, progress, exact = run.workers, run.progress, run.forward.hidden
    carried, first = workers.from_main(lambda: (progress.layer_hidden(), progress.rounded))
    entries = {}
    for index in range(first):
        put_dense(run, workers.from_main(partial(progress.dense, index)))
        if index in run.moe:
            packed = workers.from_main(partial(progress.packed, index))
            _replace(run, run.moe[index], packed)
            entries[packed.name] = packed.entry
    if carried is not None:
        exact, hidden = carried
        run.forward.advance(hidden)
    for (index,) in run.in_turns(first, 1, "Rounding layers"):
        # exact: as the unquantized model goes on; forward.hidden is the quantized one's.
        rounded = _round_layer(run, index, exact, widths)
        layer, exact = rounded.layer, rounded.exact
        run.forward.advance(rounded.hidden)
        progress.at_once = run.forward.at_once
        if layer is not None:
            entries[layer.name] = layer.entry
        if workers.main:
            progress.finish_layer(index, layer, exact, rounded.hidden, rounded.dense)
            if layer is not None:  # from now on computed from where the progress keeps it
                _replace(run, run.moe[index], progress.packed(index))
    round_head(run)
    return entries


def _replace(run: Run, layer: MoELayer, packed: PackedLayer) -> None:
    """Put packed experts in the place of a layer's unquantized ones, whose memory is freed."""
    device = next(run.model.get_submodule(layer.layer_name).parameters()).device
    module = BitsMoEExperts(layer.module, entry_spec(layer.name, packed.entry, run.config))
    module.drop_original_weights()
    module.load_packed(packed.packed)
    replace_module(run.model, layer.name, module.to(device))


@dataclass(frozen=True)
class _RoundedLayer:
    """Attributes:
    layer: None if it has no experts.
    exact, hidden: its outputs in the unquantized and in the quantized model.
    dense: stored tensors of its linear layers, see ``round_dense``.
    """

    layer: PackedLayer | None
    exact: Hidden
    hidden: Hidden
    dense: dict[str, Tensor]


@dataclass(frozen=True)
class _FittedLayer:
    """Experts rounded and packed, and what is needed to judge them.

    Attributes:
        entry: of the layer in ``BitsMoEConfig.layers``, without the report.
        exact: outputs of the decoder layer in the unquantized model.
        dense: see ``round_dense``.
        outputs: of the same with unquantized experts after quantized layers.
        token_weights: ``[T]``.
        report: of the layer, but for what must be measured.
    """

    packed: PackedExperts
    entry: dict[str, Any]
    exact: Hidden
    dense: dict[str, Tensor]
    outputs: Hidden
    token_weights: Tensor
    report: dict[str, Any]


def _round_layer(run: Run, index: int, exact: Hidden, widths: Widths) -> _RoundedLayer:
    """Quantize the experts and linear layers of a decoder layer; those of the model are replaced.

    Args:
        exact: inputs of the layer in the unquantized model.
    """
    if index not in run.moe:
        inputs, exact = exact, run.agreed(lambda: run.forward.run(index, exact))
        dense = round_dense(run, index, inputs, exact)
        hidden = finite(index, run.agreed(lambda: run.forward.run(index)))
        return _RoundedLayer(None, exact, _passed_on(run, exact, hidden), dense)
    fitted = _fit_layer(run, index, exact, widths)
    layer = PackedLayer(run.moe[index].name, fitted.packed, {**fitted.entry, "report": fitted.report})
    _replace(run, run.moe[index], layer)
    rounded = finite(index, run.agreed(lambda: run.forward.run(index)))
    errors = _output_errors(fitted.outputs, rounded, fitted.token_weights)
    fitted.report["calibration_error"] = float(errors[: run.tokens].mean())
    unseen = errors[run.tokens :]
    fitted.report["unseen_error"] = float(unseen.mean()) if len(unseen) else None
    if not run.config.allow_thin:
        refuse_thin_calibration(layer.name, fitted.report, unseen)
    return _RoundedLayer(layer, fitted.exact, _passed_on(run, fitted.exact, rounded), fitted.dense)


def _passed_on(run: Run, exact: Hidden, rounded: Hidden) -> Hidden:
    """What the next layer is calibrated on; copies, because both are written to one file."""
    return rounded if run.config.sequential else copied(exact)


def _fit_layer(run: Run, index: int, exact: Hidden, widths: Widths) -> _FittedLayer:
    """Round the experts of an MoE layer on what the layers before it put out."""
    layer, config = run.moe[index], run.config
    planned = run.workers.from_main(lambda: run.progress.plan(index))
    plan = planned.plan
    row_bits, kept = widths.rows[index].long(), widths.kept[index]
    with run.loaded(layer) as weights:
        shape, gating = layer_shape(layer.module), partial(apply_gating, layer.module)
        inputs, exact = exact, run.agreed(partial(run.forward.run, index, exact))
        dense = round_dense(run, index, inputs, exact)
        activations, outputs, (gains, direct) = run.agreed(partial(_observe, run, index))
        biases = read_biases(layer.module)
        seen = through_norm(layer.module, weights, biases, run.seen(activations, gains))
        # What is missing from the stream is in the experts' coordinates only if their output is added to it.
        wanted = config.compensation and direct
        drift = _drift(exact, outputs, gains)[: run.tokens] if wanted else None
        counts = tokens_per_expert(seen, shape)
        if plan.row_weights is not None:
            given = weights, row_bits, plan.bases, plan.energies, plan.row_weights, config, run.workers
            result = round_as_planned(*given, device=seen.hidden.device)
        else:
            problem = build_problem(layer.name, weights, seen, gating, config, plan.bases, drift, biases)
            result = round_layer(problem, row_bits, run.workers)
        dtype = run.source.dtypes[list(run.moe).index(index)]
        packed = with_originals(result.packed, weights, biases, kept, dtype)
        entry = layer_manifest(shape, packed, dtype, kept)
    others = experts_with_rows(plan.costs, kept)
    over = bits_over_bound(plan, result, shape, others) if config.cost == "output" else None
    report = {
        "estimated_error": _estimated_error(plan, row_bits, others, config),
        "calibration_error": None,
        "unseen_error": None,
        "bits_over_bound": over,
        "output_energy": plan.output_energy,
        "tokens_per_expert": counts.tolist(),
        "output_peaks": planned.outputs.peaks.tolist(),
        "super_experts": list(widths.super_experts[index]),
        "spectrum": spectrum(plan.energies, others),
    }
    return _FittedLayer(
        packed=packed,
        entry=entry,
        exact=exact,
        dense=dense,
        outputs=outputs,
        token_weights=activations.token_weights,
        report=report,
    )


def _observe(run: Run, index: int) -> tuple[LayerActivations, Hidden, tuple[Tensor | None, bool]]:
    """What the experts of an MoE layer see after quantized layers, the layer's outputs there, and what
    becomes of the experts' (``measured_passage``)."""
    experts = run.moe[index].module
    activations, outputs = capture_layer(run.forward, index, experts, run.config.token_weighting)
    return activations, outputs, measured_passage(run.forward, index, experts, outputs)


def _estimated_error(plan: LayerPlan, row_bits: Tensor, others: Tensor, config: BitsMoEConfig) -> float:
    index = torch.searchsorted(torch.tensor(config.widths, device=row_bits.device), row_bits)
    costs = plan.costs.gather(-1, index[..., None])
    return float(costs[:, others].double().sum())


def _drift(exact: list[Tensor], outputs: list[Tensor], gains: Tensor | None) -> Tensor:
    """``[T, H]``: what is missing from the residual stream ``outputs`` of the quantized model so far, as much
    as the experts must put out to add it."""
    drift = torch.cat([(a - b).flatten(0, -2) for a, b in zip(exact, outputs, strict=True)])
    return drift if gains is None else drift.float() / gains[:, None].to(drift.device)


def _output_errors(exact: list[Tensor], rounded: list[Tensor], token_weights: Tensor) -> Tensor:
    """Weighted mean square difference of two versions of a decoder layer's outputs, ``[T]``.

    Everything but the routed experts is the same in both, so this is the experts' output error.
    """
    squares = [
        (a.float() - b.float()).flatten(2).square().mean(-1).flatten()
        for a, b in zip(exact, rounded, strict=True)
    ]
    return torch.cat(squares) * token_weights.to(squares[0].device)
