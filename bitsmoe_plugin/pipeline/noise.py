"""Noise in hidden states, in the place of an error that they will have."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.calibration.carried import Carried, left_beside
from bitsmoe_plugin.pipeline.progress import Hidden


def with_noise(hidden: Hidden, share: float, seed: int) -> Carried:
    """Copies of hidden states ``[blocks, tokens, ...]`` with Gaussian noise, and what belongs to them.

    Args:
        share: mean square of the noise over that of each token.
    """
    generator = torch.Generator().manual_seed(seed)
    return Carried((_noisy(part, share, generator) for part in hidden), left_beside(hidden))


def _noisy(hidden: Tensor, share: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(hidden.shape, generator=generator, device="cpu").to(hidden.device).flatten(2)
    flat = hidden.flatten(2).float()
    flat = flat + noise * (share * flat.square().mean(-1, keepdim=True)).sqrt()
    return flat.view(hidden.shape).to(hidden.dtype)
