"""Weights outside the experts that can be learnt: those of norms and routers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bitsmoe_plugin.runtime.experts import BitsMoEExperts

_ROUTERS = ("gate", "router")
"""Parts of the names of what scores experts, in all families."""


class TunableWeights:
    """Parameters of a model as ``before + size * gain``, rounded to their dtypes after each step.

    Gains and sums are float32: a step is smaller than what 16 bits tell apart. Models compute with rounded
    values, so what is learnt from is what will be saved.

    Attributes:
        gains: of each parameter in its shape, float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._before = [p.detach().clone().float() for p in self._parameters]
        self._sizes = [before.square().mean().sqrt() for before in self._before]
        self.gains = [torch.zeros_like(before, requires_grad=True) for before in self._before]

    @contextmanager
    def learnt(self) -> Iterator[None]:
        """While this is entered the parameters get gradients; if it fails, they are as they were."""
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            yield
        except BaseException:
            for gain in self.gains:
                gain.detach().zero_()
            self.write()
            raise
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def take_gradients(self) -> None:
        """Hand the parameters' gradients, which a backward pass has left, to the gains."""
        for parameter, gain, size in zip(self._parameters, self.gains, self._sizes, strict=True):
            gain.grad = None if parameter.grad is None else parameter.grad.float() * size
            parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Have the parameters follow the gains."""
        rows = zip(self._parameters, self._before, self._sizes, self.gains, strict=True)
        for parameter, before, size, gain in rows:
            parameter.copy_(before + size * gain)


def norm_weights(model: nn.Module) -> list[nn.Parameter]:
    """Of all norms, each a value per feature."""
    return [
        parameter
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight" and parameter.dim() == 1 and parameter.is_floating_point()
    ]


def router_weights(model: nn.Module) -> list[nn.Parameter]:
    """Of what scores experts, beside them: ``[num_experts or more, hidden_size]`` for each MoE layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BitsMoEExperts):
            shape = module.whole_shape
            beside = model.get_submodule(name.rpartition(".")[0])
            for path, parameter in beside.named_parameters():
                is_router = any(part in _ROUTERS for part in path.split("."))
                sizes = parameter.dim() == 2 and parameter.shape[1] == shape.hidden_size
                if is_router and sizes and len(parameter) >= shape.num_experts:
                    found[id(parameter)] = parameter
    return list(found.values())


def learnt_weights(module: nn.Module, learn: Iterable[str]) -> list[nn.Parameter]:
    """Of a model, or of a decoder layer, what ``TuningSettings.learn`` names besides experts."""
    found: list[nn.Parameter] = []
    for name, find in WEIGHTS.items():
        found += find(module) if name in learn else []
    return found


WEIGHTS = {"norms": norm_weights, "routers": router_weights}
"""What can be learnt besides experts -> finds it."""
