"""How a decoder layer passes its experts' output on to the residual stream.

Most layers add it as it is. Some multiply it (GraniteMoe), some norm it first (FlexOlmo, Afmoe): an error of
the experts then reaches the stream larger or smaller, by a ``gain`` that norms make differ between tokens.
It is measured, by changing the output, so it takes no table of models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.calibration.statistics import LayerActivations
from bitsmoe_plugin.models.families import layout_of

_PROBE = 0.3
"""Root mean square of the change over the output's own. A norm answers with 0.96 of its slope."""
_ALIKE = 0.05
"""A median gain that is so near to 1 is 1."""


def residual_gains(
    forward: LayerwiseForward, index: int, experts: nn.Module, outputs: list[Tensor]
) -> Tensor | None:
    """Gain of every calibration token.

    Args:
        experts: the module in decoder layer ``index`` that routed tokens are given to.
        outputs: of the decoder layer, for every batch of ``forward.hidden``.

    Returns:
        ``[T]`` float32 on the CPU; None if the layer adds the experts' output as it is.
    """
    if layout_of(experts).takes_copies:  # an entry of ours, which adds it
        return None
    # A batch tells; the others are needed only if there is something to measure.
    first = _measure(forward, index, experts, outputs[:1])
    if abs(float(first.median()) - 1) < _ALIKE:
        return None
    return _measure(forward, index, experts, outputs)


def _measure(forward: LayerwiseForward, index: int, experts: nn.Module, outputs: list[Tensor]) -> Tensor:
    hidden_size = outputs[0].shape[-1]
    direction = torch.randn(hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
    direction = direction * (hidden_size**0.5 / direction.norm())
    sizes: list[Tensor] = []

    def change(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        size = _PROBE * output.float().square().mean(-1, keepdim=True).sqrt()
        sizes.append(size.flatten().cpu())
        return output + (size * direction.to(output.device)).to(output.dtype)

    handle = experts.register_forward_hook(change)
    try:
        changed = forward.run(index, forward.hidden[: len(outputs)], again=sizes.clear)
    finally:
        handle.remove()
    answers = [
        ((a.float() - b.float()) @ direction.to(a.device)).flatten().cpu() / hidden_size
        for a, b in zip(changed, outputs, strict=True)
    ]
    size = torch.cat(sizes)
    gains = torch.cat(answers) / size
    # Tokens to which the experts add nothing tell nothing, and an error there has no other gain.
    typical = gains[size > 0].median() if bool((size > 0).any()) else gains.new_ones(())
    return gains.where(size > 0, typical).clamp_min(1e-3 * float(typical.abs()))


def as_seen_by_the_stream(
    activations: LayerActivations, gains: Tensor | None, alike: bool
) -> LayerActivations:
    """Activations whose token weights make an error of the experts that of the residual stream.

    Args:
        alike: all tokens keep the same weight.
    """
    if gains is None:
        return activations
    squares = gains.square().to(activations.token_weights.device)
    return replace(
        activations, token_weights=activations.token_weights * (squares.mean() if alike else squares)
    )
