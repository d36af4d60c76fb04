"""Gradient descent on what tuning learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitsmoe_plugin.pipeline.tunable_layer import TunableLayer
from bitsmoe_plugin.pipeline.tunable_weights import TunableWeights
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings

_WARM_UP = 5
"""Steps in which the learning rate rises."""
_OF_WEIGHTS = 0.1
"""Of the learning rate, for norms and routers."""


class Descent:
    """Adam with a learning rate that rises for a few steps and then falls to 0.

    Attributes:
        steps: in all.
    """

    def __init__(
        self, layers: list[TunableLayer], weights: TunableWeights, settings: TuningSettings, per_epoch: int
    ) -> None:
        self._weights, self.steps = weights, settings.epochs * per_epoch
        scales = [gain for layer in layers for gain in layer.gains]
        rate = settings.learning_rate
        groups = [{"params": scales, "lr": rate}, {"params": weights.gains, "lr": rate * _OF_WEIGHTS}]
        self._gains = [*scales, *weights.gains]
        # The defaults remember the gradients of 1000 steps; here there may be 20 in all.
        self._optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 - step / self.steps)
        )

    def step(self, loss: Tensor) -> float:
        """Returns the loss."""
        self._optimizer.zero_grad()
        loss.backward()
        self._weights.take_gradients()
        nn.utils.clip_grad_norm_(self._gains, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._weights.write()
        return float(loss.detach())

    def gains(self) -> list[Tensor]:
        """A copy of what is learnt so far."""
        return [gain.detach().clone() for gain in self._gains]

    @torch.no_grad()
    def go_back_to(self, gains: list[Tensor]) -> None:
        """Take gains that were there before."""
        for gain, value in zip(self._gains, gains, strict=True):
            gain.copy_(value)
        self._weights.write()
