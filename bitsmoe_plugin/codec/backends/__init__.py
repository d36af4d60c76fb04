"""Rounding and packing in plain torch, in compiled C, and in Triton kernels; which one, is said here."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.codec.backends.interface import CoupledBlocks, RankRows, RoundingBackend
from bitsmoe_plugin.errors import ConfigError

__all__ = ["CoupledBlocks", "RankRows", "RoundingBackend", "backend_for", "refuse_slow"]


def backend_for(*tensors: Tensor) -> RoundingBackend:
    """What computes with these tensors: Triton on a GPU, compiled C on the CPU, where there are such."""
    # Here, because backends are written in terms of the modules that ask for one.
    from bitsmoe_plugin.codec.backends import gpu, native, reference

    if gpu.available(*tensors):
        return gpu.TRITON
    if native.available(*tensors):
        return native.COMPILED
    return reference.REFERENCE


def refuse_slow(device: torch.device | str, allowed: bool) -> None:
    """Refuse to quantize in plain torch, which takes about 20 times as long, unless that is allowed.

    Args:
        device: where rows will be rounded.

    Raises:
        ConfigError: there are no kernels for it; says why, and where the package was found.
    """
    from bitsmoe_plugin.base.native import absence
    from bitsmoe_plugin.codec.backends import gpu, reference

    sample = torch.empty(0, dtype=torch.float32, device="cpu")
    kind = torch.device(device).type
    on_gpu = kind == "cuda"
    if allowed or (gpu.has_triton() if on_gpu else backend_for(sample) is not reference.REFERENCE):
        return
    why = "Triton is not installed" if on_gpu else absence.reason()
    raise ConfigError(
        f"quantizing on {kind} without compiled kernels takes about 20 times as long: {why}. To do it all "
        "the same: --allow-slow, in Python allow_slow=True"
    )
