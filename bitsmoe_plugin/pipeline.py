"""Quantization of a whole model: calibrate and plan every layer, allocate, round and pack.

Two passes over the layers. The first collects costs on the unquantized model; the allocation
spends one budget over all of them; the second rounds, each layer on what the quantized layers
before it put out (``sequential``). Of the experts, only those of one layer are in memory at a time if their
source reads them from files.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from bitsmoe_plugin.allocation import allocate
from bitsmoe_plugin.budget import Budget
from bitsmoe_plugin.calibration import LayerwiseForward, capture_layer
from bitsmoe_plugin.checkpoint import layer_manifest, packed_spec
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.experts import BitsMoEExperts, replace_module
from bitsmoe_plugin.families import MoELayer, apply_gating, check_computation, layer_shape, read_biases
from bitsmoe_plugin.interruption import Interrupted, deferred_interrupt
from bitsmoe_plugin.kept import choose_kept, model_budget, row_groups, with_originals
from bitsmoe_plugin.layer import LayerPlan, bits_over_bound, plan_layer, round_layer
from bitsmoe_plugin.memory import release_free_memory
from bitsmoe_plugin.packing import LayerShape, PackedExperts
from bitsmoe_plugin.planned_rounding import round_as_planned
from bitsmoe_plugin.problem import build_problem
from bitsmoe_plugin.progress import Hidden, PackedLayer, PlannedLayer, Progress, ProgressInMemory, Widths
from bitsmoe_plugin.residual_gain import as_seen_by_the_stream, residual_gains
from bitsmoe_plugin.row_costs import row_sizes
from bitsmoe_plugin.run_identity import identity
from bitsmoe_plugin.saved_progress import ProgressOnDisk
from bitsmoe_plugin.sources import ExpertSource, LoadedExperts, weights_digest
from bitsmoe_plugin.spectral import ExpertWeights
from bitsmoe_plugin.spectrum import spectrum
from bitsmoe_plugin.statistics import LayerActivations
from bitsmoe_plugin.sub_budgets import RowGroup, each_layer, layer_share
from bitsmoe_plugin.super_experts import ExpertOutputs, detect, forms_massive_activations
from bitsmoe_plugin.work_directory import WorkDirectory, locked
from bitsmoe_plugin.workers import Workers

THIN_TOKENS_PER_DIMENSION = 0.25


def held_out_last(blocks: Tensor, share: float) -> tuple[Tensor, int]:
    """Move a share of the calibration blocks, evenly spaced, to the end; returns how many are before."""
    count = int(len(blocks) * share)
    apart = torch.zeros(len(blocks), dtype=torch.bool)
    apart[((torch.arange(count) + 0.5) * len(blocks) / max(count, 1)).long()] = True
    return torch.cat([blocks[~apart], blocks[apart]]), len(blocks) - count


def warn_about_thin_calibration(name: str, activations: LayerActivations, shape: LayerShape) -> Tensor:
    """Tokens per expert ``[E]``; warns if an expert saw none, or most saw too few."""
    index = activations.top_k_index.flatten()
    counts = torch.bincount(index, minlength=shape.num_experts)[: shape.num_experts]
    unrouted = torch.nonzero(counts == 0).flatten().tolist()
    if unrouted:
        warnings.warn(
            f"{name}: no calibration token was routed to expert {', '.join(map(str, unrouted))}; "
            "treated as typical experts of the layer. More or more varied calibration text helps, or "
            "all_experts=True.",
            stacklevel=2,
        )
    if float(counts.float().median()) < THIN_TOKENS_PER_DIMENSION * shape.hidden_size:
        warnings.warn(
            f"{name}: the median expert saw {int(counts.float().median())} calibration tokens for "
            f"hidden_size {shape.hidden_size}, the one with fewest {int(counts.min())}; use more "
            "calibration text (calibration_tokens), or all_experts=True.",
            stacklevel=2,
        )
    return counts


def allocate_rows(
    costs: dict[int, Tensor],
    shapes: list[LayerShape],
    groups: list[RowGroup],
    config: BitsMoEConfig,
    kept: dict[int, tuple[int, ...]],
) -> Widths:
    """Widths of all rows of all layers; one allocation for each group, or for each of its layers.

    Args:
        costs: ``[3, E, r, widths]`` of each layer, in the order of ``shapes``.
        groups: what rows may spend.
        kept: experts of each layer that have no rows.
    """
    indices, bits = list(costs), np.array(config.widths, dtype=np.uint8)
    rows = {index: torch.zeros(cost.shape[:-1], dtype=torch.uint8) for index, cost in costs.items()}
    gap = 0.0
    for group in groups if config.scope == "global" else each_layer(groups, shapes):
        own = [indices[position] for position in group.layers]
        tables = [_table(costs[index], group.factors, kept[index]) for index in own]
        sizes = [row_sizes(shapes[position], config.widths) for position in group.layers]
        result = allocate(tables, sizes, group.payload_bits)
        gap = max(gap, result.relative_gap)
        pieces = np.split(result.choice, np.cumsum([len(table) for table in tables])[:-1])
        for index, piece in zip(own, pieces, strict=True):
            experts = torch.nonzero(_others(costs[index], kept[index])).flatten()
            widths = torch.from_numpy(bits[piece]).view(len(group.factors), len(experts), -1)
            rows[index][torch.tensor(group.factors)[:, None], experts] = widths
    return Widths(rows, kept, gap)


def _others(costs: Tensor, kept: tuple[int, ...]) -> Tensor:
    """``[E]`` bool: the experts that have rows."""
    others = torch.ones(costs.shape[1], dtype=torch.bool)
    others[list(kept)] = False
    return others


def _table(costs: Tensor, factors: tuple[int, ...], kept: tuple[int, ...]) -> np.ndarray:
    """``[units, widths]``; no copy if all rows are asked for."""
    if len(factors) < len(costs):
        costs = costs[list(factors)]
    costs = costs[:, _others(costs, kept)] if kept else costs
    return costs.reshape(-1, costs.shape[-1]).numpy()


def _estimated_error(plan: LayerPlan, row_bits: Tensor, others: Tensor, config: BitsMoEConfig) -> float:
    index = torch.searchsorted(torch.tensor(config.widths), row_bits)
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
        (a.float() - b.float()).square().mean(-1).flatten() for a, b in zip(exact, rounded, strict=True)
    ]
    return torch.cat(squares) * token_weights.to(squares[0].device)


def _moe_by_index(model: nn.Module, layers: list[MoELayer]) -> tuple[nn.ModuleList, dict[int, MoELayer]]:
    """The decoder layers of a model, and the MoE layer of each that has one."""
    path = {layer.layer_name.rpartition(".")[0] for layer in layers}
    names = [layer.layer_name for layer in layers]
    if len(path) != 1 or len(set(names)) != len(names):
        raise QuantizationError(
            f"MoE layers at {', '.join(layer.name for layer in layers)}: only one per decoder layer, in "
            "one list of decoder layers, is supported"
        )
    modules = model.get_submodule(path.pop())
    assert isinstance(modules, nn.ModuleList)  # by decoder_layer_name
    return modules, {int(layer.layer_name.rpartition(".")[2]): layer for layer in layers}


@dataclass(frozen=True)
class _Run:
    """What the two passes share.

    Attributes:
        layers: number of decoder layers.
        moe: index of a decoder layer -> its MoE layer, in forward order; dense ones are left out.
        tokens: statistics see the first so many, the others are held out.
        stop: tells whether to stop at the next layer's edge; the first of ``workers`` is asked.
        progress: of the first of ``workers``; the others' stays empty.
    """

    model: nn.Module
    forward: LayerwiseForward
    layers: int
    moe: dict[int, MoELayer]
    source: ExpertSource
    progress: Progress
    budget: Budget
    tokens: int
    config: BitsMoEConfig
    stop: Callable[[], bool]
    workers: Workers

    @contextmanager
    def loaded(self, layer: MoELayer) -> Iterator[ExpertWeights]:
        """The weights of a layer, the same as when it was loaded before."""
        with self.source.loaded(layer) as weights:
            self.progress.check_weights(layer.name, weights_digest(layer))
            yield weights

    def share(self, index: int) -> int:
        """What the rows of decoder layer ``index`` would spend if it got its share of every budget."""
        groups = row_groups(self.source, self.config, self.budget, [()] * len(self.moe))
        return layer_share(groups, self.source.shapes, list(self.moe).index(index))

    def remaining(self, first: int, text: str) -> Iterator[int]:
        """Indices of the decoder layers from ``first`` on, with a progress bar.

        Raises:
            Interrupted: before a layer, if it is time to stop.
        """
        for index in logging.tqdm(range(first, self.layers), desc=text, initial=first, total=self.layers):
            if self.workers.from_main(self.stop):
                raise Interrupted(
                    f"{text.lower()} stopped after {index} of {self.layers}; {self.config.work_dir} holds "
                    "what is finished. Start the same again to go on"
                )
            release_free_memory()
            yield index


def _plan(run: _Run) -> None:
    """First pass: costs of all rows of all layers, on the unquantized model."""
    workers, progress, moe = run.workers, run.progress, list(run.moe)
    kept, first = workers.from_main(lambda: (progress.plan_hidden(), progress.planned))
    if kept is not None:
        run.forward.advance(kept)
    planned: dict[int, PlannedLayer] = {}
    passed: list[tuple[int, Hidden]] = []
    for index in run.remaining(first, "Calibrating layers"):
        if index in run.moe and workers.takes(moe.index(index)):
            planned[index], outputs = _plan_layer(run, index)
        else:
            outputs = _pass_layer(run, index)
        run.forward.advance(outputs)
        passed.append((index, outputs))
        if index + 1 < run.layers and sum(i in run.moe for i, _ in passed) not in (0, workers.size):
            continue  # to another layer, for another of the workers
        plans = workers.merged(planned)
        progress.at_once = run.forward.at_once
        for number, hidden in passed:
            if workers.main:
                progress.finish_plan(number, plans.get(number), hidden)
        planned, passed = {}, []


def _pass_layer(run: _Run, index: int) -> Hidden:
    """Outputs of a decoder layer, unquantized."""
    layer = run.moe.get(index)
    if layer is None:
        return _finite(index, run.forward.run(index))
    with run.loaded(layer):
        return run.forward.run(index)


def _finite(index: int, outputs: Hidden) -> Hidden:
    """The outputs of a decoder layer, if they are finite; of unquantized MoE layers ``build_problem`` sees to
    that."""
    if not all(bool(torch.isfinite(batch).all()) for batch in outputs):
        raise QuantizationError(
            f"decoder layer {index} puts out NaN or infinity on the calibration text; check the checkpoint, "
            "or load it in another dtype"
        )
    return outputs


def _plan_layer(run: _Run, index: int) -> tuple[PlannedLayer, Hidden]:
    """What is found out about a decoder layer's experts, and the layer's outputs."""
    layer = run.moe[index]
    with run.loaded(layer) as weights:
        activations, outputs = capture_layer(run.forward, index, layer.module, run.config.token_weighting)
        gains = residual_gains(run.forward, index, layer.module, outputs)
        seen = _seen(run, activations, gains)
        check_computation(
            layer.name, layer.module, weights, (seen.hidden, seen.top_k_index, seen.top_k_weights)
        )
        gating, biases = partial(apply_gating, layer.module), read_biases(layer.module)
        problem = build_problem(layer.name, weights, seen, gating, run.config, biases=biases)
        plan = plan_layer(problem, run.share(index))
    massive = forms_massive_activations(run.forward.hidden, outputs)
    return PlannedLayer(plan, ExpertOutputs(problem.statistics.output_peaks.cpu(), massive)), outputs


def _seen(run: _Run, activations: LayerActivations, gains: Tensor | None) -> LayerActivations:
    """What statistics see of a layer."""
    alike = run.config.token_weighting == "none"
    return as_seen_by_the_stream(activations, gains, alike).first(run.tokens)


def _allocate(run: _Run) -> Widths:
    """Choose the experts that are kept, and widths of the others' rows."""
    costs, outputs = {}, []
    for index in run.moe:  # of all layers only these are held at once
        planned = run.progress.plan(index)
        costs[index] = planned.plan.costs
        outputs.append(planned.outputs)
    found = detect(outputs)
    kept = choose_kept(run.source, found, run.budget, run.config)
    groups = row_groups(run.source, run.config, run.budget, kept)
    by_index = dict(zip(run.moe, kept, strict=True))
    widths = allocate_rows(costs, run.source.shapes, groups, run.config, by_index)
    return replace(widths, super_experts=dict(zip(run.moe, found, strict=True)))


def _round(run: _Run, widths: Widths) -> None:
    """Second pass: round and replace the experts of every layer, and write the manifest."""
    workers, progress, exact = run.workers, run.progress, run.forward.hidden
    kept, first = workers.from_main(lambda: (progress.layer_hidden(), progress.rounded))
    for index in range(first):
        if index in run.moe:
            _replace(run, run.moe[index], workers.from_main(partial(progress.packed, index)))
    if kept is not None:
        exact, hidden = kept
        run.forward.advance(hidden)
    for index in run.remaining(first, "Rounding layers"):
        # exact: as the unquantized model goes on; forward.hidden is the quantized one's.
        layer, exact, hidden = _round_layer(run, index, exact, widths)
        run.forward.advance(hidden)
        progress.at_once = run.forward.at_once
        if workers.main:
            progress.finish_layer(index, layer, exact, hidden)
            if layer is not None:  # from now on computed from where the progress keeps it
                _replace(run, run.moe[index], progress.packed(index))


def _replace(run: _Run, layer: MoELayer, packed: PackedLayer) -> None:
    """Put packed experts in the place of a layer's unquantized ones, whose memory is freed."""
    run.config.layers[layer.name] = packed.entry
    device = next(run.model.get_submodule(layer.layer_name).parameters()).device
    module = BitsMoEExperts(layer.module, packed_spec(layer.name, run.config))
    module.drop_original_weights()
    module.load_packed(packed.packed)
    replace_module(run.model, layer.name, module.to(device))


@dataclass(frozen=True)
class _FittedLayer:
    """Experts rounded and packed, and what is needed to judge them.

    Attributes:
        entry: of the layer in ``BitsMoEConfig.layers``, without the report.
        exact: outputs of the decoder layer in the unquantized model.
        outputs: of the same with unquantized experts after quantized layers.
        token_weights: ``[T]``.
        report: of the layer, but for what must be measured.
    """

    packed: PackedExperts
    entry: dict[str, Any]
    exact: Hidden
    outputs: Hidden
    token_weights: Tensor
    report: dict[str, Any]


def _round_layer(
    run: _Run, index: int, exact: Hidden, widths: Widths
) -> tuple[PackedLayer | None, Hidden, Hidden]:
    """Quantize a decoder layer's experts; those of the model are replaced.

    Args:
        exact: inputs of the layer in the unquantized model.

    Returns:
        None if it is dense; its outputs in the unquantized and in the quantized model.
    """
    if index not in run.moe:
        return None, run.forward.run(index, exact), _finite(index, run.forward.run(index))
    fitted = _fit_layer(run, index, exact, widths)
    layer = PackedLayer(run.moe[index].name, fitted.packed, {**fitted.entry, "report": fitted.report})
    _replace(run, run.moe[index], layer)
    rounded = _finite(index, run.forward.run(index))
    errors = _output_errors(fitted.outputs, rounded, fitted.token_weights)
    fitted.report["calibration_error"] = float(errors[: run.tokens].mean())
    unseen = errors[run.tokens :]
    fitted.report["unseen_error"] = float(unseen.mean()) if len(unseen) else None
    return layer, fitted.exact, rounded if run.config.sequential else fitted.outputs


def _fit_layer(run: _Run, index: int, exact: Hidden, widths: Widths) -> _FittedLayer:
    """Round the experts of an MoE layer on what the layers before it put out."""
    layer, config = run.moe[index], run.config
    planned = run.workers.from_main(lambda: run.progress.plan(index))
    plan = planned.plan
    row_bits, kept = widths.rows[index].long(), widths.kept[index]
    with run.loaded(layer) as weights:
        exact = run.forward.run(index, exact)
        activations, outputs = capture_layer(run.forward, index, layer.module, config.token_weighting)
        shape, gating = layer_shape(layer.module), partial(apply_gating, layer.module)
        gains = residual_gains(run.forward, index, layer.module, outputs)
        seen = _seen(run, activations, gains)
        drift = _drift(exact, outputs, gains)[: run.tokens] if config.compensation else None
        counts = warn_about_thin_calibration(layer.name, seen, shape)
        biases = read_biases(layer.module)
        energy, peaks = plan.output_energy, planned.outputs.peaks
        if plan.row_weights is not None:
            given = weights, row_bits, plan, plan.row_weights, config, run.workers
            result = round_as_planned(*given, device=seen.hidden.device)
        else:
            problem = build_problem(layer.name, weights, seen, gating, config, plan.bases, drift, biases)
            result = round_layer(problem, row_bits, run.workers)
            energy, peaks = problem.statistics.output_energy, problem.statistics.output_peaks
        packed = with_originals(result.packed, weights, biases, kept)
        entry = layer_manifest(shape, packed, layer.module.down_proj.dtype, kept)
    others = _others(plan.costs, kept)
    over = bits_over_bound(plan, result, shape, others) if config.cost == "output" else None
    report = {
        "estimated_error": _estimated_error(plan, row_bits, others, config),
        "calibration_error": None,
        "unseen_error": None,
        "bits_over_bound": over,
        "output_energy": energy,
        "tokens_per_expert": counts.tolist(),
        "output_peaks": peaks.tolist(),
        "super_experts": list(widths.super_experts[index]),
        "spectrum": spectrum(plan.energies, others),
    }
    return _FittedLayer(packed, entry, exact, outputs, activations.token_weights, report)


def quantize_model(
    model: nn.Module,
    blocks: Tensor,
    config: BitsMoEConfig,
    source: ExpertSource | None = None,
) -> BitsMoEConfig:
    """Quantize the routed experts of a model in place; goes on where ``config.work_dir`` says it ended.

    Where torch.distributed is initialized, its processes share the work (see ``workers``); all must call this
    with the same arguments, and the model of each is quantized.

    Args:
        model: transformers causal language model; all weights loaded, those of the experts too if ``source``
            is not given.
        blocks: ``[blocks, sequence_length]`` int64 calibration tokens.
        config: options; its manifest is replaced.
        source: where the experts' weights come from; default: the model.

    Returns:
        the config with the manifest of the packed layers.

    Raises:
        QuantizationError: no MoE layers, unknown family, NaN weights, budget out of reach, a work
            directory of another run, or other arguments than another process's.
        Interrupted: Ctrl-C, after a layer, if there is a work directory.
    """
    source, workers = source or LoadedExperts(model), Workers.present()
    _check_same(workers, source, blocks, config)
    if config.work_dir is None:
        return _quantize(model, blocks, config, source, ProgressInMemory(), lambda: False, workers)
    path = Path(config.work_dir)
    if not workers.main:
        with deferred_interrupt() as stop:
            return _quantize(model, blocks, config, source, ProgressInMemory(), stop, workers)
    with locked(path), deferred_interrupt() as stop:
        bound_to = identity(model, blocks, config, source)
        progress = ProgressOnDisk(WorkDirectory(path), bound_to, next(model.parameters()).device)
        return _quantize(model, blocks, config, source, progress, stop, workers)


def _check_same(workers: Workers, source: ExpertSource, blocks: Tensor, config: BitsMoEConfig) -> None:
    """Refuse to mix what processes compute from different models, texts or options."""
    options = {key: value for key, value in config.to_dict().items() if key != "layers"}
    own = repr((source.shapes, source.dtypes, options, _digest(blocks), torch.get_num_threads()))
    if workers.from_main(lambda: own) != own:
        raise QuantizationError(
            f"process {workers.rank} of torch.distributed was given another model, calibration text, option "
            "or number of threads than process 0; start all with the same"
        )


def _digest(blocks: Tensor) -> str:
    return hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()


def _quantize(
    model: nn.Module,
    blocks: Tensor,
    config: BitsMoEConfig,
    source: ExpertSource,
    progress: Progress,
    stop: Callable[[], bool],
    workers: Workers,
) -> BitsMoEConfig:
    """``quantize_model`` from what ``progress`` has on."""
    budget = model_budget(source, config)
    modules, moe = _moe_by_index(model, source.layers)
    training = model.training
    model.eval()
    with torch.no_grad():
        blocks, seen = held_out_last(blocks, config.held_out)
        tokens = seen * blocks.shape[1]
        forward = LayerwiseForward(model, modules, blocks, config.batch_size)
        at_once = workers.from_main(lambda: progress.at_once)
        if (
            at_once is not None and at_once < forward.at_once
        ):  # before it was interrupted, it ran out of memory
            forward.limit(at_once)
        run = _Run(model, forward, len(modules), moe, source, progress, budget, tokens, config, stop, workers)
        widths = workers.from_main(lambda: progress.widths)
        if widths is None:
            _plan(run)
            widths = workers.from_main(lambda: _allocate(run))
            if workers.main:
                progress.finish_widths(widths)
        config.layers = {}
        forward.restart()
        _round(run, widths)
    model.train(training)
    config.calibration = {
        "tokens": tokens,
        "held_out_tokens": blocks.numel() - tokens,
        "sha256": _digest(blocks),
        "allocation_relative_gap": widths.relative_gap,
    }
    return config
