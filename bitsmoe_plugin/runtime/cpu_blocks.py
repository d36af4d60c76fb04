"""What a CPU computes of a token in the same way wherever in a batch it stands."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from bitsmoe_plugin.base.native import library, pointer
from bitsmoe_plugin.models.gating import Gating

CHUNK = 64
"""Of ``csrc/bitsmoe.h``; a multiple of what all instructions of torch take at once."""
STORED_DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""Numbers in ``csrc/bitsmoe.h`` of dtypes in which biases and kept experts are stored."""
_BLOCK = 16384
"""Elements of a gating's block, fewer than torch shares out over threads."""


@cache
def _product() -> ctypes._NamedFuncPointer:
    lib = library()
    assert lib is not None
    address = c_void_p
    lib.bitsmoe_dense.argtypes = [address, c_int, c_int, c_int, address, c_int64, address, c_int]
    return lib.bitsmoe_dense


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32, ``[n, rows]`` of ``[n, columns]`` and ``[rows, columns]``.

    torch's own sums in an order that follows the number of rows and, in float32, that of threads.
    """
    rows, columns = weight.shape
    x = functional.pad(x.float(), (0, -columns % CHUNK)).contiguous()
    weight = weight.contiguous()
    out = x.new_empty(len(x), rows)
    how = (STORED_DTYPES[weight.dtype], rows, columns, pointer(x), len(x), pointer(out))
    if _product()(pointer(weight), *how, torch.get_num_threads()):
        raise MemoryError(f"no memory for a row of {columns} weights")
    return out


def gated(gating: Gating, products: Tensor) -> Tensor:
    """``[n, I]`` of ``[n, inputs, I]`` float32, in blocks of one size: what torch computes of an element
    depends on where in a tensor it stands, at the end of one by other instructions."""
    size = products.shape[-1]
    padded_size = -(-size // CHUNK) * CHUNK
    block = max(1, _BLOCK // padded_size)
    padded = products.new_zeros(products.shape[1], block, padded_size)
    out = products.new_empty(len(products), size)
    for start in range(0, len(products), block):
        part = products[start : start + block]
        padded[:, : len(part), :size] = part.transpose(0, 1)
        out[start : start + block] = gating(*padded)[: len(part), :size]
    return out
