"""Rounding and packing in plain torch, in compiled C, and in Triton kernels; which one, is said here."""

from __future__ import annotations

from torch import Tensor

from bitsmoe_plugin.codec.backends.interface import RankRows, RoundingBackend

__all__ = ["RankRows", "RoundingBackend", "backend_for"]


def backend_for(*tensors: Tensor) -> RoundingBackend:
    """What computes with these tensors: Triton on a GPU, compiled C on the CPU, where there are such."""
    # Here, because backends are written in terms of the modules that ask for one.
    from bitsmoe_plugin.codec.backends import gpu, native, reference

    if gpu.available(*tensors):
        return gpu.TRITON
    if native.available(*tensors):
        return native.COMPILED
    return reference.REFERENCE
