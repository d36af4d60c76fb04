"""Tuning of a packed model: its scales, and if wanted norms and routers, learnt through the whole model.

Layers are quantized one at a time, so what their errors together do to the model's predictions is seen only
at the end. Every group of basis values has a float16 scale and every row a scale code; gradient descent moves
these such that KL(full precision || packed) falls on calibration text. Codes, widths and all other tensors
stay, and so do size and speed. (Continuous parameters are tuned after quantization in AQLM, arXiv 2401.06118,
and QuIP#, arXiv 2402.04396, too; there norms and whole layers, here what belongs to the experts first.)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.calibration.blocks import held_out_last
from bitsmoe_plugin.checkpoint.manifest import tensor_digest
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.model_class import text_model
from bitsmoe_plugin.pipeline.descent import Descent
from bitsmoe_plugin.pipeline.descent_progress import Best, DescentProgress
from bitsmoe_plugin.pipeline.tunable_layer import DifferentiableOriginals, TunableLayer
from bitsmoe_plugin.pipeline.tunable_weights import WEIGHTS, TunableWeights, learnt_weights
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


@dataclass(frozen=True)
class Tuning:
    """Attributes:
    tokens: that were learnt from.
    epoch: after which the scales were taken; 0: nothing was better than what was there.
    before, after: KL(full precision || packed) on the held-out blocks, nats per token.
    learnt: what could move, see ``TuningSettings.learn``.
    through: "model", "layers" or "both", one after the other; see ``TuningSettings.through``.
    """

    tokens: int
    epoch: int
    before: float
    after: float
    learnt: tuple[str, ...] = ("bases",)
    through: str = "model"

    def noted(self) -> dict[str, Any]:
        """As the manifest has it, JSON-ready."""
        return {**asdict(self), "learnt": list(self.learnt)}


@known_state(gradients=True)
def tune(
    model: Any,
    reference: nn.Module,
    blocks: Tensor,
    settings: TuningSettings,
    progress: DescentProgress | None = None,
) -> Tuning:
    """Tune a packed model in place; a config that says so, with the hashes, takes the place of its config.

    If it fails, or nothing is better than before on the blocks held out, the model is as it was.

    Args:
        model: a transformers causal language model with packed experts (``BitsMoEExperts``).
        reference: what it was quantized from, on the same device.
        blocks: ``[blocks, sequence_length]`` int64, calibration text.
        progress: of an earlier call with the same arguments, which is continued, or of this one. Without it
            Ctrl-C, once an epoch came closer, ends the call with that epoch.

    Raises:
        QuantizationError: no packed experts, nothing there to learn of what is asked for, too few blocks, or
            a divergence that is not finite.
        Interrupted: see ``DescentProgress``.
    """
    modules = tunable_modules(model, settings)
    check_blocks(len(blocks), settings)
    device = next(model.parameters()).device
    blocks, seen = held_out_last(blocks, settings.held_out)
    learnt, held = blocks[:seen].to(device), blocks[seen:].to(device)
    layers = {name: TunableLayer(module, settings.learn) for name, module in modules.items()}
    weights = TunableWeights(tunable_weights(model, settings))
    descent = Descent(list(layers.values()), weights, settings, -(-len(learnt) // settings.batch_size))
    with only_gains(model, reference), weights.learnt(), computed_by(modules, layers):
        best = _learn((model, reference), learnt, held, descent, settings, progress)
    result = Tuning(
        tokens=learnt.numel(), epoch=best.epoch, before=best.before, after=best.after, learnt=settings.learn
    )
    if best.epoch:
        config = copy.copy(model.config.quantization_config)  # others may hold that one
        for name, module in modules.items():
            module.load_packed(layers[name].tuned())
            config.layers[name]["sha256"] = tensor_digest(module.packed())
        config.calibration["tuning"] = result.noted()
        model.config.quantization_config = config
    return result


def check_blocks(blocks: int, settings: TuningSettings) -> None:
    """Refuse so few that none would be held out.

    Raises:
        QuantizationError: naming both numbers.
    """
    if not int(blocks * settings.held_out):
        raise QuantizationError(
            f"{blocks} blocks of calibration text are too few to hold {settings.held_out:g} of them "
            f"out; give at least {-int(-1 // settings.held_out)}, or hold out a larger share"
        )


def tunable_modules(model: nn.Module, settings: TuningSettings) -> dict[str, BitsMoEExperts]:
    """The packed experts of a model, by name.

    Raises:
        QuantizationError: there are none, or none of what is to be learnt.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, BitsMoEExperts)}
    if not modules:
        raise QuantizationError("the model has no packed experts to tune; give one that `quantize` wrote")
    spec = next(iter(modules.values())).spec
    if spec.is_tiled:
        raise QuantizationError(
            'bases and rows of the grid "tiled" have no scales that could be tuned; quantize the original'
        )
    if spec.basis_bits == 16 and "bases" in settings.learn:
        raise QuantizationError(
            "bases of basis_bits=16 have no scales that could be tuned; leave bases out of what is learnt "
            "(learn), or use basis_bits=4 or 8"
        )
    return modules


def tunable_weights(model: nn.Module, settings: TuningSettings) -> list[nn.Parameter]:
    """What is to be learnt besides experts.

    Raises:
        QuantizationError: there is none of it.
    """
    for name, find in WEIGHTS.items():
        if name in settings.learn and not find(model):
            raise QuantizationError(
                f"no {name} were found in {type(model).__name__}; leave {name} out of what is learnt"
            )
    return learnt_weights(model, settings.learn)


@contextmanager
def only_gains(*models: nn.Module) -> Iterator[None]:
    """No parameter of the models gets a gradient."""
    wanted = [p for model in models for p in model.parameters() if p.requires_grad]
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for model, was in zip(models, training, strict=True):
            model.train(was)


@contextmanager
def computed_by(
    modules: dict[str, BitsMoEExperts], layers: Mapping[str, Any], *, complete: bool = False
) -> Iterator[None]:
    """Modules are computed by other runtimes inside.

    Args:
        layers: the runtimes, by the names of modules.
        complete: whether they see to biases and kept experts themselves.
    """
    try:
        for name, module in modules.items():
            spec, layer = module.spec, layers[name]
            originals = not complete and (spec.has_bias or bool(spec.kept))
            module.compute_by(DifferentiableOriginals(layer, spec, module.gating) if originals else layer)
        yield
    finally:
        for module in modules.values():
            module.compute_by(None)


def _learn(
    models: tuple[Any, nn.Module],
    learnt: Tensor,
    held: Tensor,
    descent: Descent,
    settings: TuningSettings,
    progress: DescentProgress | None,
) -> Best:
    """Leaves the best gains. Without progress, Ctrl-C once there are some ends it with them."""
    order, per_epoch = torch.Generator().manual_seed(settings.seed), descent.steps // settings.epochs
    best = None if progress is None else progress.take_up(descent)
    if best is None:
        divergence = _held_out(*models, held, settings.batch_size)
        best = Best(0, divergence, divergence, descent.gains())
    try:
        with logging.tqdm(total=descent.steps, initial=descent.taken, desc="Tuning") as bar:
            for epoch in range(1, settings.epochs + 1):
                shuffled = learnt[torch.randperm(len(learnt), generator=order, device="cpu")]
                done = descent.taken - (epoch - 1) * per_epoch
                if done >= per_epoch:
                    continue
                for batch in shuffled.split(settings.batch_size)[done:]:
                    if progress is not None:
                        progress.before_step(descent, best)
                    loss = descent.step(_divergence(*models, batch))
                    bar.set_postfix(KL=f"{loss:.4f}", held_out=f"{best.after:.4f}", refresh=False)
                    bar.update()
                divergence = _held_out(*models, held, settings.batch_size)
                if divergence < best.after:
                    best = Best(epoch, best.before, divergence, descent.gains())
                if progress is not None:
                    progress.save(descent, best)
    except KeyboardInterrupt:
        if progress is not None or not best.epoch:
            raise
        warnings.warn(f"stopped; what was learnt until epoch {best.epoch} is kept", stacklevel=2)
    descent.go_back_to(best.gains)
    return best


@torch.no_grad()
def _held_out(model: nn.Module, reference: nn.Module, blocks: Tensor, batch_size: int) -> float:
    parts = [_divergence(model, reference, batch) * len(batch) for batch in blocks.split(batch_size)]
    return float(torch.stack(parts).sum() / len(blocks))


def _divergence(model: nn.Module, reference: nn.Module, batch: Tensor) -> Tensor:
    """Mean KL(reference || model) per token, nats."""
    with torch.no_grad():
        wanted = text_model(reference)(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
    found = text_model(model)(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
    loss = nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
    if not torch.isfinite(loss):
        raise QuantizationError(
            "the divergence from the reference is not finite: outputs of one of the two models are not. If "
            "the first steps went well, take a smaller learning rate"
        )
    return loss
