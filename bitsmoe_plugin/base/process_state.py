"""State of the process that would change what is computed, as it is in a process that has changed none.

Users set a default dtype or device, enter autocast or inference mode, or allow products in lower precision
for work of their own. What is stored must not depend on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

_BACKENDS: Any = torch.backends  # its attributes are made at import
_PRECISIONS = (_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.cuda.matmul)
_NUMPY_ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}


@contextmanager
def known_state(gradients: bool = False) -> Iterator[None]:
    """Compute as in a fresh process; afterwards everything is as it was. Also a decorator.

    Default dtype float32, no default device, no autocast, no inference mode, products of float32 in float32,
    denormal numbers kept, numpy's usual answer to overflow. Neither the number of threads nor random numbers
    are touched: the former belongs to the machine, and generators of our own are seeded by the options.

    Args:
        gradients: whether autograd records.
    """
    with ExitStack() as stack:
        stack.enter_context(_float32())
        stack.enter_context(exact_products())
        stack.enter_context(_denormals())
        stack.enter_context(np.errstate(**_NUMPY_ERRORS))  # type: ignore[arg-type]
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """Floating point tensors are float32 unless told otherwise."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 are not rounded to TF32 or bfloat16, whichever of torch's two ways said so."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # where both ways were used, and differ
        precision = "highest"
    general = _BACKENDS.fp32_precision
    _BACKENDS.fp32_precision = "none"  # what the others do not say themselves, they take from it
    own = [backend.fp32_precision for backend in _PRECISIONS]
    _BACKENDS.mkldnn.conv.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for backend, value in zip(_PRECISIONS, own, strict=True):
            backend.fp32_precision = value
        _BACKENDS.fp32_precision = general


@contextmanager
def _denormals() -> Iterator[None]:
    """The processor does not take the smallest numbers for zero; torch has no way to ask whether it does."""
    flushed = sys.float_info.min / 2 == 0
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)
