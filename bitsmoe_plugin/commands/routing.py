"""How often two models choose other experts for the same token.

What a router chose is read where every family says it: at the call of its experts module, packed or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers, layout_of
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> experts module of each MoE layer, packed or as transformers has it, in forward order.

    Raises:
        QuantizationError: there are none, or of a convention that is not known; naming the family.
    """
    packed: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, BitsMoEExperts)
    }
    return packed or {layer.name: layer.module for layer in find_moe_layers(model)}


def selected(module: Any, arguments: list[Any]) -> Tensor:
    """``[T, k]`` int64, rising: ids of the experts that a call of an experts module is for.

    Families that pass a copy of the tokens per expert are read off the copies; k is then the number of
    experts, and -1 stands where one is not selected.
    """
    original = module.original if isinstance(module, BitsMoEExperts) else module
    if not layout_of(original).takes_copies:
        return arguments[1].flatten(0, -2).long().sort(-1).values  # type: ignore[no-any-return]
    routed = arguments[0].unflatten(0, (module.num_experts, -1)).ne(0).any(-1).T  # [T, E]
    ids = torch.arange(routed.shape[1], device=routed.device)
    return torch.where(routed, ids, -1).sort(-1).values


def other_experts(ours: Tensor, theirs: Tensor) -> Tensor:
    """``[T]`` bool: whether the sets of selected experts differ.

    Args:
        ours, theirs: from ``selected``, ``[T, k]`` each; with another k they differ everywhere.
    """
    if ours.shape[1] != theirs.shape[1]:
        return torch.ones(len(ours), dtype=torch.bool, device=ours.device)
    return (ours != theirs.to(ours.device)).any(-1)


class RoutingComparison:
    """Share of tokens for which a model and its reference select other sets of experts, by layer.

    Attributes:
        unknown: why it cannot be told; None while it can.
    """

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        self.unknown: str | None = None
        self._modules: list[dict[str, nn.Module]] = []
        self._differing: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        try:
            self._modules = [experts_modules(given) for given in (model, reference)]
        except QuantizationError as error:
            self.unknown = str(error)
            return
        ours, theirs = map(len, self._modules)
        if ours != theirs:
            self.unknown = f"the model has {ours} MoE layers and the reference {theirs}"
        elif any((getattr(given, "_tp_size", None) or 1) > 1 for given in (model, reference)):
            self.unknown = "experts are divided over processes, each of which sees its own"
        self._seen: list[list[list[Tensor]]] = [[[] for _ in modules] for modules in self._modules]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While this is entered, calls of both models are recorded."""
        handles = []
        if self.unknown is None:
            for modules, seen in zip(self._modules, self._seen, strict=True):
                handles += [self._record(m, calls) for m, calls in zip(modules.values(), seen, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _record(module: nn.Module, calls: list[Tensor]) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(selected(module, [*args, *kwargs.values()]))

        return module.register_forward_pre_hook(note, with_kwargs=True)

    def add(self, batch: int, length: int, scored: int) -> None:
        """Count what was recorded since the last call, for the tokens whose successors are scored.

        Args:
            batch, length: of the tokens that both models were given, ``[batch, length]``.
            scored: how many tokens at the end of each block are predicted.
        """
        if self.unknown is not None:
            return
        for name, ours, theirs in zip(self._modules[0], *self._seen, strict=True):
            shapes = [[len(call) for call in calls] for calls in (ours, theirs)]
            if shapes[0] != shapes[1] or any(tokens != batch * length for tokens in shapes[0]):
                self.unknown = (
                    f"{name}: experts were called for {shapes[0]} tokens, those of the reference for "
                    f"{shapes[1]}, and the text has {batch * length}"
                )
                return
            for pair in zip(ours, theirs, strict=True):  # models that loop call a layer more than once
                differing = other_experts(*pair).view(batch, length)[:, -1 - scored : -1]
                self._differing[name] = self._differing.get(name, 0) + int(differing.sum())
                self._tokens[name] = self._tokens.get(name, 0) + differing.numel()
            ours.clear()
            theirs.clear()

    def by_layer(self) -> dict[str, float] | None:
        """Path of the experts module -> share of the tokens; None where it is ``unknown``."""
        if self.unknown is not None:
            return None
        return {name: count / self._tokens[name] for name, count in self._differing.items()}

    def overall(self) -> float | None:
        """Of all tokens in all layers; None where it is ``unknown``."""
        if self.unknown is not None or not self._tokens:
            return None
        return sum(self._differing.values()) / sum(self._tokens.values())
