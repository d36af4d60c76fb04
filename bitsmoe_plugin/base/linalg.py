"""Matrix products in float32, which most of the time of quantization goes into."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

_MULTIPLE = 64
"""Token counts are filled up to a multiple: oneDNN compiles, and keeps, a kernel for every shape."""


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``, ``[m, k]``, of float32 matrices ``[m, n]`` and ``[k, n]``.

    torch itself multiplies float32 matrices with MKL, which reaches half of oneDNN's speed on processors
    of AMD (98 against 220 billion operations per second on one core of Zen 5).
    """
    if a.device.type != "cpu" or not _has_onednn() or not a.numel():
        return a @ b.T
    filled = pad(a, (0, 0, 0, -len(a) % _MULTIPLE)) if len(a) % _MULTIPLE else a.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(filled, b.contiguous(), None, "none", [], "")
    return result[: len(a)]


def weighted_products(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """``sum_n weights[n] a[n] b[n]^T``, ``[m, k]``, of float32 ``[n, m]`` and ``[n, k]``."""
    missing = (0, -len(weights) % _MULTIPLE)
    right = pad(b.T, missing).contiguous()
    # Transposing takes longer than weighting, so it is done once where once is enough.
    left = right if a is b else pad(a.T, missing).contiguous()
    return product(left * pad(weights, missing), right)
