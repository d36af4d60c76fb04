"""First pass over the layers of a model: what every row of every layer would cost.

On the unquantized model. Where processes share the work, each plans a layer of every turn and passes through
the rest.
"""

from __future__ import annotations

from functools import partial

from bitsmoe_plugin.calibration.coverage import warn_about_thin_calibration
from bitsmoe_plugin.calibration.layerwise_forward import capture_layer
from bitsmoe_plugin.calibration.post_norm import through_norm
from bitsmoe_plugin.calibration.residual_gain import residual_gains
from bitsmoe_plugin.calibration.super_experts import ExpertOutputs, forms_massive_activations
from bitsmoe_plugin.models.declared_computation import check_computation
from bitsmoe_plugin.models.dense_units import NO_LAYER
from bitsmoe_plugin.models.families import apply_gating, layer_shape, read_biases
from bitsmoe_plugin.pipeline.dense_costs import DenseCosts, dense_costs
from bitsmoe_plugin.pipeline.head_costs import head_costs
from bitsmoe_plugin.pipeline.layer_plan import LayerPlan, expected_error, plan_layer
from bitsmoe_plugin.pipeline.progress import Hidden, PlannedLayer
from bitsmoe_plugin.pipeline.run import Run, finite
from bitsmoe_plugin.spectral.layer_problem import build_problem


def plan_layers(run: Run) -> None:
    """First pass: costs of all rows of all layers, on the unquantized model."""
    workers, progress = run.workers, run.progress
    carried, first = workers.from_main(lambda: (progress.plan_hidden(), progress.planned))
    if carried is not None:
        run.forward.advance(carried)
    for turn in run.in_turns(first, workers.size, "Calibrating layers"):
        # Not after each layer: none waits for another while it plans.
        planned, costs, passed = run.agreed(partial(_plan_turn, run, turn, run.forward.hidden))
        plans = workers.merged(planned)
        progress.dense_costs.update(workers.merged(costs))
        progress.at_once = run.forward.at_once
        for index, hidden in zip(turn, passed, strict=True):
            if workers.main:
                progress.finish_plan(index, plans.get(index), hidden)
    progress.dense_costs[NO_LAYER] = workers.from_main(lambda: head_costs(run))


def _plan_turn(
    run: Run, turn: list[int], hidden: Hidden
) -> tuple[dict[int, PlannedLayer], dict[int, DenseCosts], list[Hidden]]:
    """What this worker's part of a turn is planned to, costs of linear layers in it, and the outputs of all
    of its layers.

    Args:
        hidden: inputs of the first of them.
    """
    planned: dict[int, PlannedLayer] = {}
    passed: list[Hidden] = []
    costs: dict[int, DenseCosts] = {}
    run.forward.advance(hidden)
    for index in turn:
        if index in run.moe and run.workers.takes(list(run.moe).index(index)):
            planned[index], costs[index], outputs = _plan_layer(run, index)
        else:
            outputs = _pass_layer(run, index)
            if index not in run.moe and run.workers.main:
                costs[index] = dense_costs(run, index, outputs)
        run.forward.advance(outputs)
        passed.append(outputs)
    return planned, {index: found for index, found in costs.items() if found}, passed


def _pass_layer(run: Run, index: int) -> Hidden:
    """Outputs of a decoder layer, unquantized."""
    layer = run.moe.get(index)
    if layer is None:
        return finite(index, run.forward.run(index))
    with run.loaded(layer):
        return run.forward.run(index)


def _plan_layer(run: Run, index: int) -> tuple[PlannedLayer, DenseCosts, Hidden]:
    """What is found out about a decoder layer's experts and linear layers, and the layer's outputs."""
    layer = run.moe[index]
    with run.loaded(layer) as weights:
        activations, outputs = capture_layer(run.forward, index, layer.module, run.config.token_weighting)
        gains = residual_gains(run.forward, index, layer.module, outputs)
        seen = run.seen(activations, gains)
        warn_about_thin_calibration(layer.name, seen, layer_shape(layer.module))
        check_computation(
            layer.name, layer.module, weights, (seen.hidden, seen.top_k_index, seen.top_k_weights)
        )
        gating, biases = partial(apply_gating, layer.module), read_biases(layer.module)
        seen = through_norm(layer.module, weights, biases, seen)
        problem = build_problem(layer.name, weights, seen, gating, run.config, biases=biases)
        plan = plan_layer(problem, run.share(index))
        costs = dense_costs(run, index, outputs, _error_before(run, index, plan))
    massive = forms_massive_activations(run.forward.hidden, outputs)
    peaks = problem.statistics.output_peaks.cpu()
    return PlannedLayer(plan, ExpertOutputs(peaks, massive)), costs, outputs


def _error_before(run: Run, index: int, plan: LayerPlan) -> float:
    """What experts of earlier layers will have added to a layer's inputs, if each adds as much as its own do.

    Other workers may be planning them now.
    """
    earlier = sum(other < index for other in run.moe)
    if not run.units or not earlier:
        return 0.0
    shape = layer_shape(run.moe[index].module)
    return earlier * expected_error(plan, shape, run.config.widths, run.share(index))
