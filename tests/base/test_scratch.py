"""``base/scratch.py``."""

import torch

from bitsmoe_plugin.base.scratch import Scratch

LIKE = torch.zeros(1)


def test_a_tensor_takes_the_place_of_the_one_before() -> None:
    scratch = Scratch()
    first = scratch.empty("a", LIKE, (4, 6))
    again = scratch.empty("a", LIKE, (3, 5))
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == (3, 5)
    assert again.is_contiguous()


def test_others_have_memory_of_their_own() -> None:
    scratch = Scratch()
    first = scratch.empty("a", LIKE, (4, 6)).fill_(1)
    for other in (
        scratch.empty("b", LIKE, (4, 6)),
        scratch.empty("a", LIKE, (4, 6), torch.int32),
        scratch.empty("a", LIKE, (5, 6)),
    ):
        other.fill_(2)
    assert torch.all(first == 1)


def test_none_is_empty_too() -> None:
    assert Scratch().empty("a", LIKE, (0, 6)).shape == (0, 6)
