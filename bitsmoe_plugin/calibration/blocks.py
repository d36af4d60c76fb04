"""Blocks of calibration tokens: of text all of one length, of conversations with images each of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
"""Arguments of a model's forward pass; ``input_ids`` is ``[blocks, tokens]``."""


class ConversationBlocks(list[Inputs]):
    """What a processor makes of conversations, one block each: ``input_ids`` ``[1, tokens]`` int64, and what
    belongs to its images (``pixel_values`` and the like)."""


Blocks = Tensor | ConversationBlocks
"""``[blocks, sequence_length]`` int64, or blocks with images."""


def token_count(blocks: Blocks) -> int:
    """Tokens of all blocks, those of images too."""
    if isinstance(blocks, Tensor):
        return blocks.numel()
    return sum(block["input_ids"].numel() for block in blocks)


def blocks_digest(blocks: Blocks) -> str:
    """SHA-256 of the tokens, and of what belongs to images."""
    if isinstance(blocks, Tensor):
        return hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()
    digest = hashlib.sha256()
    for block in blocks:
        for name, tensor in sorted(block.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def batches(blocks: Blocks, size: int) -> list[Inputs]:
    """Arguments of forward passes over at most ``size`` blocks; those with images go one by one, because
    their lengths differ and padding would count as text."""
    if isinstance(blocks, Tensor):
        return [{"input_ids": batch} for batch in blocks.split(size)]
    return list(blocks)


def pieces(batch: Inputs, size: int) -> Iterator[Inputs]:
    """A batch in parts of at most ``size`` blocks."""
    if len(batch["input_ids"]) == 1:
        yield batch
        return
    for part in batch["input_ids"].split(size):
        yield {"input_ids": part}


@overload
def held_out_last(blocks: Tensor, share: float) -> tuple[Tensor, int]: ...
@overload
def held_out_last(blocks: Blocks, share: float) -> tuple[Blocks, int]: ...
def held_out_last(blocks: Blocks, share: float) -> tuple[Blocks, int]:
    """Move a share of the calibration blocks, evenly spaced, to the end; returns how many are before."""
    count = int(len(blocks) * share)
    apart = torch.zeros(len(blocks), dtype=torch.bool, device="cpu")
    apart[((torch.arange(count, device="cpu") + 0.5) * len(blocks) / max(count, 1)).long()] = True
    order = torch.cat([torch.nonzero(~apart)[:, 0], torch.nonzero(apart)[:, 0]])
    if isinstance(blocks, Tensor):
        return blocks[order.to(blocks.device)], len(blocks) - count
    return ConversationBlocks(blocks[index] for index in order.tolist()), len(blocks) - count


def seen_tokens(blocks: Blocks, seen: int, share: float) -> int:
    """Tokens, the first ones, that statistics are of: those of the first ``seen`` blocks; where these are
    all, too few to hold any out, all but this share, the end of the last."""
    tokens = token_count(take(blocks, seen))
    return tokens if seen < len(blocks) else tokens - int(tokens * share)


def take(blocks: Blocks, count: int) -> Blocks:
    """The first blocks."""
    return blocks[:count] if isinstance(blocks, Tensor) else ConversationBlocks(list(blocks)[:count])
