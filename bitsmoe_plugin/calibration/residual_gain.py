"""How a decoder layer passes its experts' output on to the residual stream.

Most layers add it as it is. Some multiply it (GraniteMoe), some norm it first (FlexOlmo, Afmoe): an error of
the experts then reaches the stream larger or smaller, by a ``gain`` that norms make differ between tokens.
It is measured, by changing the output, so it takes no table of models. Where the output is projected first
(experts of a latent size), the gain is that of the size of a change, whose direction is another one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.calibration.carried import first_batches
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.models.families import layer_shape, layout_of

_PROBE = 0.3
"""Root mean square of the change over the output's own. A norm answers with 0.96 of its slope."""
_ALIKE = 0.05
"""A median gain that is so near to 1 is 1."""
_DIRECT = 0.5
"""Cosine of a change of the output and what becomes of it: above, it is added, maybe normed; a projection to
n dimensions leaves about 1 / sqrt(n)."""


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
    return measured_passage(forward, index, experts, outputs)[0]


def measured_passage(
    forward: LayerwiseForward, index: int, experts: nn.Module, outputs: list[Tensor]
) -> tuple[Tensor | None, bool]:
    """``residual_gains``, and whether the experts' output is in coordinates of the residual stream."""
    if layout_of(experts).takes_copies:  # an entry of ours, which adds it
        return None, True
    # A batch tells; the others are needed only if there is something to measure.
    first, direct = _measure(forward, index, experts, outputs[:1])
    if abs(float(first.median()) - 1) < _ALIKE:
        return None, direct
    return _measure(forward, index, experts, outputs)


def _measure(
    forward: LayerwiseForward, index: int, experts: nn.Module, outputs: list[Tensor]
) -> tuple[Tensor, bool]:
    hidden_size = layer_shape(experts).hidden_size
    direction = torch.randn(hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
    direction = direction * (hidden_size**0.5 / direction.norm())
    sizes: list[Tensor] = []

    def change(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        size = _PROBE * output.float().square().mean(-1, keepdim=True).sqrt()
        sizes.append(size.flatten().cpu())
        return output + (size * direction.to(output.device)).to(output.dtype)

    handle = experts.register_forward_hook(change)
    try:
        changed = forward.run(index, first_batches(forward.hidden, len(outputs)), again=sizes.clear)
    finally:
        handle.remove()
    # Several residual streams, [blocks, tokens, streams, H], are one long one.
    changes = [(a.float() - b.float()).flatten(2) for a, b in zip(changed, outputs, strict=True)]
    lengths = torch.cat([change.square().mean(-1).sqrt().flatten().cpu() for change in changes])
    size = torch.cat(sizes)
    along = lengths.new_zeros(lengths.shape)
    if changes[0].shape[-1] == hidden_size:
        along = torch.cat(
            [(change @ direction.to(change.device)).flatten().cpu() / hidden_size for change in changes]
        )
    direct = not bool((lengths > 0).any()) or float((along / lengths)[lengths > 0].median().abs()) > _DIRECT
    gains = (along if direct else lengths) / size
    # Tokens to which the experts add nothing tell nothing, and an error there has no other gain.
    typical = gains[size > 0].median() if bool((size > 0).any()) else gains.new_ones(())
    return gains.where(size > 0, typical).clamp_min(1e-3 * float(typical.abs())), direct


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
