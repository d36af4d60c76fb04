"""Tuning layer by layer: of the experts those of one decoder layer, or of a few, are in memory at a time.

Each layer of the packed model, given what its layers before put out, is brought closer to what the original
puts out there: the mean square of what is missing, tokens weighed as in quantization. Text held out chooses
the epoch; where none is better, the layer stays. Hidden states of both models are read from files in chunks.
Finished layers are kept in a work directory, from which a run that was interrupted goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from bitsmoe_plugin.base.free_memory import release_free_memory
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.work_directory import WorkDirectory
from bitsmoe_plugin.checkpoint.manifest import tensor_digest
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_source import ExpertSource
from bitsmoe_plugin.models.families import decoder_layer_name
from bitsmoe_plugin.pipeline.layer_descent import LayerDescent
from bitsmoe_plugin.pipeline.run_identity import tuning_identity
from bitsmoe_plugin.pipeline.tune_scales import (
    Tuning,
    check_blocks,
    only_gains,
    tunable_modules,
    tunable_weights,
)
from bitsmoe_plugin.pipeline.tuning_progress import TUNED, TunedBlock, TuningProgress
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings
from bitsmoe_plugin.pipeline.tuning_streams import Streams
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


@dataclass(frozen=True)
class Original:
    """What was quantized, its experts on disk.

    Attributes:
        model: on the device where it is computed.
        source: of its experts.
    """

    model: Any
    source: ExpertSource


@known_state(gradients=True)
def tune_layers(
    model: Any,
    original: Original,
    blocks: Tensor,
    settings: TuningSettings,
    directory: WorkDirectory,
    stop: Callable[[], bool] = lambda: False,
) -> Tuning:
    """Tune a packed model in place; a config that says so takes the place of its config.

    Unless the predictions on the blocks held out come closer to the original's, the model is as it was.

    Args:
        model: a transformers causal language model with packed experts, all else on the device of the
            original; experts are taken there one layer at a time.
        blocks: ``[blocks, sequence_length]`` int64, calibration text.
        directory: where finished layers are kept; an earlier call with the same arguments is continued.
        stop: asked before each layer whether to stop there.

    Raises:
        QuantizationError: see ``tune_scales.tune``; or two models of different depths.
        Interrupted: ``stop`` said so.
    """
    modules = tunable_modules(model, settings)
    check_blocks(len(blocks), settings)
    layers = _decoder_layers(model, modules, original)
    identity = tuning_identity(model, original.source.files, blocks, settings)
    progress = TuningProgress(directory, identity, next(original.model.parameters()).device)
    weighting = model.config.quantization_config.token_weighting
    with only_gains(model, original.model), _as_before_unless(model, modules, settings) as gained:
        pair = original.model, model
        streams = Streams(pair, layers, original.source, blocks, settings, progress, weighting)
        _tune(streams, _blocks(layers[1], modules, settings), settings, progress, stop)
        epoch, (before, after) = max(b.epoch for b in progress.blocks), streams.divergences()
        result = Tuning(
            tokens=streams.tokens,
            epoch=epoch,
            before=before,
            after=after,
            learnt=settings.learn,
            through="layers",
        )
        if epoch and after < before:
            gained.append(result)
    if not gained:
        return replace(result, epoch=0, after=before)
    _note(model, modules, result)
    return result


def _decoder_layers(
    model: Any, modules: dict[str, BitsMoEExperts], original: Original
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Those of the original and of the packed model.

    Raises:
        QuantizationError: not as many.
    """
    of_packed = decoder_layer_name(model, next(iter(modules)))
    of_original = original.source.layers[0].layer_name
    found = [
        m.get_submodule(name.rpartition(".")[0])
        for m, name in ((original.model, of_original), (model, of_packed))
    ]
    if len(found[0]) != len(found[1]):
        raise QuantizationError(
            f"the original has {len(found[0])} decoder layers and the packed model {len(found[1])}; give the "
            "model that was quantized"
        )
    return found[0], found[1]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Block:
    """Attributes:
    layers: decoder layers that are tuned together.
    modules: packed experts in them, by name.
    """

    layers: list[int]
    modules: dict[str, BitsMoEExperts]


def _blocks(
    layers: nn.ModuleList, modules: dict[str, BitsMoEExperts], settings: TuningSettings
) -> list[_Block]:
    every, owner = settings.layers_at_once, dict[int, int]()
    for index, layer in enumerate(layers):
        owner |= {id(module): index for module in layer.modules() if isinstance(module, BitsMoEExperts)}
    found = []
    for first in range(0, len(layers), every):
        indices = list(range(first, min(first + every, len(layers))))
        found.append(_Block(indices, {n: m for n, m in modules.items() if owner[id(m)] in indices}))
    return found


def _tune(
    streams: Streams,
    blocks: list[_Block],
    settings: TuningSettings,
    progress: TuningProgress,
    stop: Callable[[], bool],
) -> None:
    """All blocks of layers that are not finished; those that are get what they learnt."""
    layers = streams.layers[1]
    per_block = settings.epochs * sum(chunk.batches for chunk in streams.chunks if not chunk.held)
    others = set(settings.learn) & {"norms", "routers"}
    steps = [per_block if block.modules or others else 0 for block in blocks]
    done = len(progress.blocks)
    for finished in progress.blocks:
        _put(progress, finished, layers)
    with logging.tqdm(total=sum(steps), initial=sum(steps[:done]), desc="Tuning layers") as bar:
        for block in blocks[done:]:
            if stop():
                raise Interrupted(
                    f"tuning stopped after {block.layers[0]} of {len(layers)} layers; "
                    f"{progress.directory.path} holds what is finished. Start the same again to go on"
                )
            with _on_device(block.modules, streams.device):
                _tune_block(streams, block, settings, progress, bar)
            release_free_memory()


def _tune_block(
    streams: Streams, block: _Block, settings: TuningSettings, progress: TuningProgress, bar: Any
) -> None:
    streams.pass_original(block.layers)
    streams.pass_packed(block.layers, untuned=True)
    learnt = LayerDescent(
        streams=streams, layers=block.layers, modules=block.modules, settings=settings, bar=bar
    ).run()
    layers = streams.layers[1]
    if learnt.block.epoch:
        names = {id(module): name for name, module in block.modules.items()}
        for index in block.layers:
            inside = [names[id(module)] for module in layers[index].modules() if id(module) in names]
            packed = learnt.packed[inside[0]] if inside else None
            weights = learnt.parameters_in(layers[index])
            progress.write(index, packed, weights, codes="codes" in settings.learn)
        _put(progress, learnt.block, layers)
    streams.pass_packed(block.layers)
    streams.agree()
    progress.finish(learnt.block)


def _put(progress: TuningProgress, block: TunedBlock, layers: nn.ModuleList) -> None:
    """Give decoder layers what was learnt in them."""
    for index in block.layers:
        if block.epoch:
            progress.put(index, layers[index])


@contextmanager
def _on_device(modules: dict[str, BitsMoEExperts], device: torch.device) -> Iterator[None]:
    """Packed experts are on a device inside; afterwards what was large is where it was before."""
    away = {n: m.packed() for n, m in modules.items() if m.packed().payload.device != device}
    for name, packed in away.items():
        modules[name].load_packed(
            PackedExperts(**{n.removeprefix("bitsmoe_"): tensor.to(device) for n, tensor in packed.tensors()})
        )
    try:
        yield
    finally:
        for name, packed in away.items():
            now, home = modules[name].packed(), packed.payload.device
            modules[name].load_packed(replace(packed, **{n: getattr(now, n).to(home) for n in TUNED}))


@contextmanager
def _as_before_unless(
    model: nn.Module, modules: dict[str, BitsMoEExperts], settings: TuningSettings
) -> Iterator[list[Tuning]]:
    """The model is as it was unless, at the end, something is in the list."""
    packed = {name: module.packed() for name, module in modules.items()}
    others = [(p, p.detach().clone()) for p in tunable_weights(model, settings)]
    gained: list[Tuning] = []
    try:
        yield gained
    finally:
        if not gained:
            for name, module in modules.items():
                module.load_packed(packed[name])
            for parameter, value in others:
                parameter.data.copy_(value)


def _note(model: Any, modules: dict[str, BitsMoEExperts], result: Tuning) -> None:
    """Have the model's config, which others may hold, say what was learnt, in a copy."""
    config = copy.copy(model.config.quantization_config)
    for name, module in modules.items():
        config.layers[name]["sha256"] = tensor_digest(module.packed())
    config.calibration["tuning"] = result.noted()
    model.config.quantization_config = config
