"""Quantization of a whole model: calibrate and plan every layer, allocate, round and pack.

Two passes over the layers. The first (``plan_pass``) collects costs on the unquantized model; the
allocation (``row_widths``) spends one budget over all of them; the second (``round_pass``) rounds, each
layer on what the quantized layers before it put out. Of the experts, only those of one layer are in memory at
a time if their source reads them from files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitsmoe_plugin.allocation.row_widths import Widths, allocate_rows
from bitsmoe_plugin.allocation.super_expert_policy import choose_kept, row_groups
from bitsmoe_plugin.base.interruption import deferred_interrupt
from bitsmoe_plugin.base.option_checks import check_choice
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.spans import recorded
from bitsmoe_plugin.base.threads import within_limits
from bitsmoe_plugin.base.work_directory import WorkDirectory, locked
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.calibration.blocks import Blocks, blocks_digest, held_out_last, seen_tokens, token_count
from bitsmoe_plugin.calibration.coverage import warn_about_few_tokens
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.calibration.super_experts import detect
from bitsmoe_plugin.codec.backends import refuse_slow
from bitsmoe_plugin.codec.row_codec import GRIDS
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_source import ExpertSource, LoadedExperts
from bitsmoe_plugin.models.families import MoELayer
from bitsmoe_plugin.models.low_precision import check_loaded
from bitsmoe_plugin.models.routing import experts_per_token
from bitsmoe_plugin.pipeline.dense_costs import chosen_dense, unit_costs
from bitsmoe_plugin.pipeline.dense_pass import planned_dense
from bitsmoe_plugin.pipeline.model_state import check_unpacked, in_evaluation_mode, refused_if_it_fails
from bitsmoe_plugin.pipeline.plan_pass import plan_layers
from bitsmoe_plugin.pipeline.progress import Progress, ProgressInMemory
from bitsmoe_plugin.pipeline.progress_on_disk import ProgressOnDisk
from bitsmoe_plugin.pipeline.round_pass import round_layers
from bitsmoe_plugin.pipeline.run import Run
from bitsmoe_plugin.pipeline.run_identity import identity
from bitsmoe_plugin.pipeline.size_budget import WholeBudget, whole_budget
from bitsmoe_plugin.runtime.dense_linear import dense_manifest


@known_state()
def quantize_model(
    model: nn.Module,
    blocks: Blocks,
    config: BitsMoEConfig,
    source: ExpertSource | None = None,
    carried_bytes: int = 0,
) -> BitsMoEConfig:
    """Quantize the routed experts of a model in place; goes on where ``config.work_dir`` says it ended.

    Where torch.distributed is initialized, its processes share the work (see ``workers``); all must call this
    with the same arguments, and the model of each is quantized. If it fails, in any of them, model and config
    are as they were; once experts were replaced, a call of the model says that it has to be loaded again.

    Args:
        model: transformers language model; all weights loaded, those of the experts too if ``source``
            is not given.
        blocks: ``[blocks, sequence_length]`` int64 calibration tokens, or conversations with images.
        config: options; its manifest is replaced.
        source: where the experts' weights come from; default: the model.
        carried_bytes: of tensors that will be saved with the model, which has no module for them; they count
            for ``size``.

    Returns:
        the config with the manifest of the packed layers.

    Raises:
        ConfigError: an option is wrong, or the compiled kernels are missing (``allow_slow``).
        QuantizationError: a model in low precision or packed, no MoE layers, unknown family, NaN weights,
            budget out of reach, a work directory of another run, or other arguments than another process's.
        Interrupted: Ctrl-C, after a layer, if there is a work directory.
    """
    config.validate()
    check_loaded(model)
    check_unpacked(model)
    check_choice("grid", config.grid, GRIDS)  # not that of checkpoints that were imported
    source, workers = source or LoadedExperts(model), Workers.present()
    refuse_slow(next(model.parameters()).device, config.allow_slow)
    with within_limits(), workers.together(), refused_if_it_fails(model):
        _check_same(workers, source, blocks, config)
        budget = whole_budget(model, source, config, carried_bytes)
        manifest = _start(model, blocks, config, source, workers, budget)
    config.layers, config.calibration = manifest.layers, manifest.calibration
    config.dense = manifest.dense
    return config


@dataclass(frozen=True)
class _Manifest:
    """What is recorded of packed layers, as ``BitsMoEConfig`` has it."""

    layers: dict[str, dict[str, Any]]
    calibration: dict[str, Any]
    dense: dict[str, Any]


def _start(
    model: nn.Module,
    blocks: Blocks,
    config: BitsMoEConfig,
    source: ExpertSource,
    workers: Workers,
    budget: WholeBudget,
) -> _Manifest:
    """Quantize, with progress where the options say that it is kept."""
    if config.work_dir is None:
        return _quantize(model, blocks, config, source, ProgressInMemory(), lambda: False, workers, budget)
    path = Path(config.work_dir)
    if not workers.main:
        with deferred_interrupt() as stop:
            return _quantize(model, blocks, config, source, ProgressInMemory(), stop, workers, budget)
    with locked(path), deferred_interrupt() as stop:
        bound_to = identity(model, blocks, config, source)
        progress = ProgressOnDisk(WorkDirectory(path), bound_to, next(model.parameters()).device)
        return _quantize(model, blocks, config, source, progress, stop, workers, budget)


def _check_same(workers: Workers, source: ExpertSource, blocks: Blocks, config: BitsMoEConfig) -> None:
    """Refuse to mix what processes compute from different models, texts or options."""
    options = {key: value for key, value in config.to_dict().items() if key != "layers"}
    own = repr((source.shapes, source.dtypes, options, blocks_digest(blocks), torch.get_num_threads()))
    if workers.from_main(lambda: own) != own:
        raise QuantizationError(
            f"process {workers.rank} of torch.distributed was given another model, calibration text, option "
            "or number of threads than process 0; start all with the same"
        )


def _quantize(
    model: nn.Module,
    blocks: Blocks,
    config: BitsMoEConfig,
    source: ExpertSource,
    progress: Progress,
    stop: Callable[[], bool],
    workers: Workers,
    budget: WholeBudget,
) -> _Manifest:
    """``quantize_model`` from what ``progress`` has on."""
    modules, moe = _moe_by_index(model, source.layers)
    dense = planned_dense(model, source.layers, config)
    timed = recorded(progress.seconds, next(model.parameters()).device)
    with timed, in_evaluation_mode(model), torch.no_grad():
        blocks, seen = held_out_last(blocks, config.held_out)
        tokens = seen_tokens(blocks, seen, config.held_out)
        if workers.main and not config.all_experts:
            warn_about_few_tokens(tokens, source.shapes, experts_per_token(model.config))
        forward = LayerwiseForward(model, modules, blocks, config.batch_size)
        at_once = workers.from_main(lambda: progress.at_once)
        # Smaller than chosen now: before it was interrupted, the run had too little memory for more.
        if at_once is not None and at_once < forward.at_once:
            forward.limit(at_once)
        run = Run(
            model=model,
            forward=forward,
            layers=len(modules),
            moe=moe,
            source=source,
            progress=progress,
            budget=budget.rows,
            tokens=tokens,
            config=config,
            stop=stop,
            workers=workers,
            dense=dense,
            units=budget.units,
        )
        widths = workers.from_main(lambda: progress.widths)
        if widths is None:
            plan_layers(run)
            widths = workers.from_main(lambda: _allocate(run))
            if workers.main:
                progress.finish_widths(widths)
        if run.units:
            run = replace(run, dense=chosen_dense(run.units, widths.dense, dense))
        forward.restart()
        layers = round_layers(run, widths)
    calibration = {
        "tokens": tokens,
        "held_out_tokens": token_count(blocks) - tokens,
        "sha256": blocks_digest(blocks),
        "allocation_relative_gap": widths.relative_gap,
    }
    return _Manifest(layers, calibration, dense_manifest(model))


def _moe_by_index(model: nn.Module, layers: list[MoELayer]) -> tuple[nn.ModuleList, dict[int, MoELayer]]:
    """The decoder layers of a model, and the MoE layer of each that has one."""
    modules = model.get_submodule(layers[0].layer_name.rpartition(".")[0])  # all are in one
    assert isinstance(modules, nn.ModuleList)  # by decoder_layer_name
    return modules, {int(layer.layer_name.rpartition(".")[2]): layer for layer in layers}


def _allocate(run: Run) -> Widths:
    """Choose the experts that are kept, and widths of the others' rows."""
    costs, outputs = {}, []
    for index in run.moe:  # of all layers only these are held at once
        planned = run.progress.plan(index)
        costs[index] = planned.plan.costs
        outputs.append(planned.outputs)
    found = detect(outputs)
    kept = choose_kept(run.source, found, run.budget, run.config)
    groups = row_groups(run.source, run.config, run.budget, kept)
    dense = [(cost, unit.sizes) for unit, cost in zip(run.units, unit_costs(run), strict=True)]
    widths = allocate_rows(
        costs, run.source.shapes, groups, run.config, dict(zip(run.moe, kept, strict=True)), dense
    )
    return replace(widths, super_experts=dict(zip(run.moe, found, strict=True)))
