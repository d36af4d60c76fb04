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
_OF_CODES = 5.0
"""Of the learning rate, for values in units of their rows' scales."""
KINDS = {"gains": "", "counts": "step", "means": "exp_avg", "squares": "exp_avg_sq"}
"""Tensors that a descent goes on from -> what torch calls those that Adam has of each gain."""


class Descent:
    """Adam with a learning rate that rises for a few steps and then falls to 0.

    Attributes:
        steps: in all.
        taken: of them.
    """

    def __init__(
        self, layers: list[TunableLayer], weights: TunableWeights, settings: TuningSettings, per_epoch: int
    ) -> None:
        self._weights, self.steps, self.taken = weights, settings.epochs * per_epoch, 0
        scales = [gain for layer in layers for gain in layer.scale_gains]
        codes = [gain for layer in layers for gain in layer.code_gains]
        rate = settings.learning_rate
        groups = [
            {"params": scales, "lr": rate},
            {"params": codes, "lr": rate * _OF_CODES},
            {"params": weights.gains, "lr": rate * _OF_WEIGHTS},
        ]
        self._gains = [*scales, *codes, *weights.gains]
        # The defaults remember the gradients of 1000 steps; here there may be 20 in all.
        self._optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95))
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def step(self, loss: Tensor) -> float:
        """Returns the loss."""
        share = min(1.0, (self.taken + 1) / _WARM_UP) * (1 - self.taken / self.steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimizer.zero_grad()
        loss.backward()
        self._weights.take_gradients()
        nn.utils.clip_grad_norm_(self._gains, 1.0)
        self._optimizer.step()
        self.taken += 1
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

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What ``go_on`` needs, not copied: kind, see ``KINDS`` -> number of a gain -> tensor."""
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for number, gain in enumerate(self._gains):
            known = {"": gain.detach(), **self._optimizer.state.get(gain, {})}  # none before its first step
            for kind, key in KINDS.items():
                found[kind] |= {str(number): known[key]} if key in known else {}
        return found

    @torch.no_grad()
    def go_on(self, taken: int, state: dict[str, dict[str, Tensor]]) -> None:
        """Be where another descent was after so many steps.

        Args:
            state: of it; becomes this one's.
        """
        self.taken = taken
        for number, gain in enumerate(self._gains):
            known = {
                key: state[kind][str(number)] for kind, key in KINDS.items() if str(number) in state[kind]
            }
            gain.copy_(known.pop(""))
            if known:
                own = {
                    key: tensor if key == "step" else tensor.to(gain.device) for key, tensor in known.items()
                }
                self._optimizer.state[gain] = own
        self._weights.write()
