"""``bench decode``: what is generated from."""

from __future__ import annotations

from pathlib import Path

from bitsmoe_plugin.commands.bench import decode

TASK = {"engine": "transformers", "dtype": "bfloat16", "batches": [1, 3], "prompt_tokens": 7, "new_tokens": 2}


def test_every_sequence_has_a_prompt_of_its_own() -> None:
    """Equal prompts go to the same experts, of which dense models then read few."""
    prompts = decode._prompts(TASK, 16, 1000)
    assert len({tuple(prompt) for prompt in prompts}) == 16
    assert {len(prompt) for prompt in prompts} == {7}
    assert prompts == decode._prompts(TASK, 16, 1000)


def test_one_time_for_each_number_of_sequences(moe_tiny_path: Path) -> None:
    assert len(decode.run({**TASK, "model": str(moe_tiny_path)})) == 2
