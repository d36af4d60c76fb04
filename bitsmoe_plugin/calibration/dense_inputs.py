"""Second moments of what linear layers of a decoder layer are given, each token by its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bitsmoe_plugin.base.linalg import weighted_products
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward


def input_moments(
    forward: LayerwiseForward, index: int, modules: Mapping[str, nn.Linear], token_weights: Tensor
) -> dict[str, Tensor]:
    """Run decoder layer ``index`` on ``forward.hidden``; ``sum_t weights[t] x[t] x[t]^T`` of each module.

    Args:
        modules: by name.
        token_weights: ``[T]`` float32, 0 for tokens that are held out.

    Returns:
        name -> ``[in_features, in_features]`` float32, on the module's device; empty for a module that was
        not called.
    """
    moments = _Moments(token_weights)
    handles = [forward.layer(index).register_forward_pre_hook(moments.begin)]
    handles += [
        module.register_forward_pre_hook(lambda _, args, name=name: moments.add(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        forward.run(index, again=moments.clear)
    finally:
        for handle in handles:
            handle.remove()
    return moments.found


class _Moments:
    """Sums over the calls of a decoder layer, which is given all tokens in their order, some at a time."""

    def __init__(self, token_weights: Tensor) -> None:
        self._all = token_weights
        self.clear()

    def clear(self) -> None:
        self.found: dict[str, Tensor] = {}
        self._first = 0
        self._weights = self._all[:0]
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)

    def begin(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0].shape[:-1].numel()
        self._weights = self._all[self._first : self._first + tokens]
        self._first += tokens

    def add(self, name: str, inputs: Tensor) -> None:
        given, product = self._last
        if given is not inputs or product is None:  # the query's, key's and value's are one tensor
            rows = inputs.detach().flatten(0, -2).float()
            weights = self._weights.to(rows.device)
            if len(rows) != len(weights):  # not called with one row per token: all rows alike
                weights = weights.mean().expand(len(rows))
            product = weighted_products(rows, rows, weights)
            self._last = (inputs, product)
        self.found[name] = self.found[name] + product if name in self.found else product
