"""Parts of the pipeline that need no model."""

from __future__ import annotations

import pytest
import torch

from bitsmoe_plugin.calibration.blocks import ConversationBlocks, held_out_last, seen_tokens


@pytest.mark.parametrize("blocks", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("share", [0.0, 0.0625, 0.3, 0.5])
def test_held_out_blocks_are_moved_to_the_end(blocks: int, share: float) -> None:
    """Guards held-out error against tokens that are lost, seen twice or in both parts: a permutation
    of whole blocks that keeps the order within both parts, the promised share (rounded down) last."""
    given = torch.stack([torch.arange(blocks), torch.arange(blocks) * 1000], 1)
    moved, seen = held_out_last(given, share)
    assert seen == blocks - int(blocks * share)
    assert seen > 0
    assert torch.equal(moved.sort(0).values, given)
    assert torch.equal(moved[:, 0] * 1000, moved[:, 1]), "a block was taken apart"
    for part in (moved[:seen, 0], moved[seen:, 0]):
        assert bool((part.diff() > 0).all())


def test_held_out_blocks_are_evenly_spaced() -> None:
    """Guards against holding out one topic: text files are not shuffled. Gaps differ by at most one,
    and neither end is favoured."""
    moved, seen = held_out_last(torch.arange(103)[:, None], 0.1)
    apart = moved[seen:, 0]
    assert len(apart) == 10
    assert set(apart.diff().tolist()) <= {10, 11}
    assert 0 < int(apart[0]) <= 10
    assert 92 <= int(apart[-1]) < 102


def test_nothing_is_held_out_at_share_zero() -> None:
    """The blocks stay as they are; so do too few blocks for one to be spared."""
    for blocks, share in ((12, 0.0), (3, 0.25)):
        given = torch.arange(2 * blocks).view(blocks, 2)
        moved, seen = held_out_last(given, share)
        assert torch.equal(moved, given)
        assert seen == blocks


@pytest.mark.parametrize(
    ("blocks", "share", "wanted"),
    [(1, 0.0625, 94), (3, 0.25, 225), (15, 0.0625, 1407), (16, 0.0625, 1500), (3, 0.0, 300)],
)
def test_of_too_few_blocks_the_end_of_the_last_is_held_out(blocks: int, share: float, wanted: int) -> None:
    """Guards text that is so thin that nothing told how thin."""
    given = torch.zeros(blocks, 100, dtype=torch.int64)
    moved, seen = held_out_last(given, share)
    assert seen_tokens(moved, seen, share) == wanted
    conversations = ConversationBlocks({"input_ids": block[None]} for block in given)
    assert seen_tokens(*held_out_last(conversations, share), share) == wanted
