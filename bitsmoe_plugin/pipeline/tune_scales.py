"""Tuning of a packed model: the scales of its shared bases, learnt through the whole model.

Layers are quantized one at a time, so what their errors together do to the model's predictions is seen only
at the end. Every group of basis values has a float16 scale; gradient descent moves these scales such that
KL(full precision || packed) falls on calibration text. Codes, widths and all other tensors stay, and so
do size and speed. (Continuous parameters are tuned after quantization in AQLM, arXiv 2401.06118, and
QuIP#, arXiv 2402.04396, too; there norms and whole layers, here what belongs to the experts.)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.calibration.blocks import held_out_last
from bitsmoe_plugin.checkpoint.manifest import tensor_digest
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.model_class import text_model
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings
from bitsmoe_plugin.runtime.experts import BitsMoEExperts
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer
from bitsmoe_plugin.runtime.with_originals import WithOriginals

_WARM_UP = 5
"""Steps in which the learning rate rises."""
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Tuning:
    """Attributes:
    tokens: that were learnt from.
    epoch: after which the scales were taken; 0: nothing was better than what was there.
    before, after: KL(full precision || packed) on the held-out blocks, nats per token.
    """

    tokens: int
    epoch: int
    before: float
    after: float


class TunableLayer:
    """A packed layer whose basis scales are multiplied with exp(gain); see ``dispatch.Runtime``.

    What it computes is computed again in the backward pass, so that the decoded rows of only one layer are
    in memory.
    """

    def __init__(self, module: BitsMoEExperts) -> None:
        self._layer = ReferenceLayer.prepare(module.spec, module.packed(), module.gating)
        self._scales = self.packed.input_scales, self.packed.output_scales
        self.gains = tuple(
            torch.zeros(scales.shape, dtype=torch.float32, device=scales.device, requires_grad=True)
            for scales in self._scales
        )

    @property
    def packed(self) -> PackedExperts:
        """The tensors that it computes from."""
        return self._layer.packed

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Differentiable in the gains, too."""
        inputs = hidden, top_k_index, top_k_weights, *self.gains
        return checkpoint(self._compute, *inputs, use_reentrant=False)  # type: ignore[no-any-return]

    def _compute(self, hidden: Tensor, index: Tensor, weights: Tensor, *gains: Tensor) -> Tensor:
        bases = [
            (basis.view(*gain.shape, -1) * gain.exp()[..., None]).flatten(1)
            for basis, gain in zip(self._layer.bases(), gains, strict=True)
        ]
        return self._layer.compute(hidden, index, weights, *bases)

    def scales(self) -> tuple[Tensor, ...]:
        """The scales as they are stored, int16, with the gains in them."""
        return tuple(
            (scales.view(torch.float16).float() * gain.detach().exp())
            .clamp(-_LARGEST, _LARGEST)
            .half()
            .view(torch.int16)
            for scales, gain in zip(self._scales, self.gains, strict=True)
        )


class _DifferentiableOriginals(WithOriginals):
    forward = WithOriginals.compute


@known_state(gradients=True)
def tune(model: Any, reference: nn.Module, blocks: Tensor, settings: TuningSettings) -> Tuning:
    """Tune the basis scales of a packed model in place; a config that says so, with their hashes, takes the
    place of its config.

    Args:
        model: a transformers causal language model with packed experts (``BitsMoEExperts``).
        reference: what it was quantized from, on the same device.
        blocks: ``[blocks, sequence_length]`` int64, calibration text.

    Raises:
        QuantizationError: no packed experts, bases without scales, too few blocks, or a divergence that is
            not finite.
    """
    modules = _tunable_modules(model)
    device = next(model.parameters()).device
    blocks, seen = held_out_last(blocks, settings.held_out)
    if seen == len(blocks):
        raise QuantizationError(
            f"{len(blocks)} blocks of calibration text are too few to hold {settings.held_out:g} of them "
            f"out; give at least {-int(-1 // settings.held_out)}, or hold out a larger share"
        )
    learnt, held = blocks[:seen].to(device), blocks[seen:].to(device)
    layers = {name: TunableLayer(module) for name, module in modules.items()}
    with _only_gains(model, reference), _computed_by(modules, layers):
        best = _learn(model, reference, learnt, held, list(layers.values()), settings)
    if best.epoch:
        config = copy.copy(model.config.quantization_config)  # others may hold that one
        for name, module in modules.items():
            _store(module, layers[name])
            config.layers[name]["sha256"] = tensor_digest(module.packed())
        config.calibration["tuning"] = asdict(best)
        model.config.quantization_config = config
    return best


def _tunable_modules(model: nn.Module) -> dict[str, BitsMoEExperts]:
    modules = {name: m for name, m in model.named_modules() if isinstance(m, BitsMoEExperts)}
    if not modules:
        raise QuantizationError("the model has no packed experts to tune; give one that `quantize` wrote")
    spec = next(iter(modules.values())).spec
    if spec.basis_bits == 16 or spec.is_tiled:
        what = "basis_bits=16" if spec.basis_bits == 16 else 'the grid "tiled"'
        raise QuantizationError(f"bases of {what} have no scales that could be tuned; use basis_bits=4 or 8")
    return modules


@contextmanager
def _only_gains(*models: nn.Module) -> Iterator[None]:
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
def _computed_by(modules: dict[str, BitsMoEExperts], layers: dict[str, TunableLayer]) -> Iterator[None]:
    try:
        for name, module in modules.items():
            spec, layer = module.spec, layers[name]
            originals = spec.has_bias or bool(spec.kept)
            module.compute_by(_DifferentiableOriginals(layer, spec, module.gating) if originals else layer)
        yield
    finally:
        for module in modules.values():
            module.compute_by(None)


def _learn(
    model: nn.Module,
    reference: nn.Module,
    learnt: Tensor,
    held: Tensor,
    layers: list[TunableLayer],
    settings: TuningSettings,
) -> Tuning:
    """Leaves the layers with the best gains; Ctrl-C once there are some ends it with them."""
    gains = [gain for layer in layers for gain in layer.gains]
    steps = settings.epochs * -(-len(learnt) // settings.batch_size)
    descent = _Descent(gains, settings.learning_rate, steps)
    order = torch.Generator().manual_seed(settings.seed)
    divergence = _held_out(model, reference, held, settings.batch_size)
    best = Tuning(learnt.numel(), 0, divergence, divergence)
    best_gains = [gain.detach().clone() for gain in gains]
    try:
        with logging.tqdm(total=steps, desc="Tuning") as bar:
            for epoch in range(1, settings.epochs + 1):
                shuffled = learnt[torch.randperm(len(learnt), generator=order, device="cpu")]
                for batch in shuffled.split(settings.batch_size):
                    loss = descent.step(_divergence(model, reference, batch))
                    bar.set_postfix(KL=f"{loss:.4f}", held_out=f"{best.after:.4f}", refresh=False)
                    bar.update()
                divergence = _held_out(model, reference, held, settings.batch_size)
                if divergence < best.after:
                    best = replace(best, epoch=epoch, after=divergence)
                    best_gains = [gain.detach().clone() for gain in gains]
    except KeyboardInterrupt:
        if not best.epoch:
            raise
        warnings.warn(f"stopped; the scales are those after epoch {best.epoch}", stacklevel=2)
    with torch.no_grad():
        for gain, value in zip(gains, best_gains, strict=True):
            gain.copy_(value)
    return best


class _Descent:
    """Adam with a learning rate that rises for a few steps and then falls to 0."""

    def __init__(self, gains: list[Tensor], learning_rate: float, steps: int) -> None:
        self._gains = gains
        # The defaults remember the gradients of 1000 steps; here there may be 20 in all.
        self._optimizer = torch.optim.Adam(gains, lr=learning_rate, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
        )

    def step(self, loss: Tensor) -> float:
        """Returns the loss."""
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._gains, 1.0)
        self._optimizer.step()
        self._schedule.step()
        return float(loss.detach())


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


def _store(module: BitsMoEExperts, layer: TunableLayer) -> None:
    """Put tuned scales into a module."""
    input_scales, output_scales = layer.scales()
    module.load_packed(replace(module.packed(), input_scales=input_scales, output_scales=output_scales))
