"""Codes of a few bits in 32-bit words, blocks of 32 codes; ``layout`` says which words a layer stores."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.codec import trellis
from bitsmoe_plugin.codec.backends import backend_for
from bitsmoe_plugin.codec.block import BLOCK


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into 32-bit words.

    Args:
        codes: ``[rows, n]`` whole numbers in ``0 .. 2**bits - 1``; n is padded to blocks of 32.
        bits: 1 to 16.

    Returns:
        ``[rows, ceil(n / 32) * bits]`` int32.
    """
    return backend_for(codes).pack_codes(whole_blocks(codes), bits)


def whole_blocks(codes: Tensor) -> Tensor:
    """Codes ``[..., n]`` with zeros up to whole blocks; no copy if there are none to add."""
    missing = -codes.shape[-1] % BLOCK
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes


def pack_codes_reference(padded: Tensor, bits: int) -> Tensor:
    """``pack_codes`` in plain torch, of whole blocks ``[rows, n]`` int64."""
    rows = len(padded)
    values = padded.view(rows, -1, BLOCK)
    words = torch.zeros(rows, values.shape[1], bits + 1, dtype=torch.int64, device=padded.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        shifted = values[:, :, i] << shift
        words[:, :, word] |= shifted & 0xFFFFFFFF
        words[:, :, word + 1] |= shifted >> 32
    words = words[:, :, :bits]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).reshape(rows, -1)


def unpack_codes(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of ``pack_codes``: ``[rows, blocks * bits]`` int32 -> ``[rows, n]`` int32."""
    return _fields(words, bits, 0, bits)[:, :n].to(torch.int32)


def unpack_windows(words: Tensor, bits: int, n: int) -> Tensor:
    """``trellis.windows`` of packed codes: ``[rows, blocks * bits]`` int32 -> ``[rows, n]`` int64."""
    return _fields(words, bits, bits - trellis.WINDOW, trellis.WINDOW)[:, :n]


def _fields(words: Tensor, bits: int, offset: int, length: int) -> Tensor:
    """``[rows, blocks * 32]`` int64: the ``length`` bits from bit i * bits + offset of each block's ring."""
    rows = words.shape[0]
    unsigned = words.view(rows, -1, bits).to(torch.int64) & 0xFFFFFFFF
    start = (torch.arange(BLOCK, device=words.device) * bits + offset) % (BLOCK * bits)
    word, shift = start // 32, start % 32
    following = unsigned[:, :, (word + 1) % bits] << 32
    return (((unsigned[:, :, word] | following) >> shift) & (2**length - 1)).view(rows, -1)
