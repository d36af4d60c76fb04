"""Sizes of layers for multi-token prediction, which no model of transformers has a module for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitsmoe_plugin.checkpoint.prediction_layers import PredictionSize, depth_of, prediction_size

PACKED = {"model.layers.1.mlp.experts.bitsmoe_payload": torch.zeros(5, dtype=torch.int32)}
OWN = {"model.layers.1.self_attn.q_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    "prefix", ["mtp.layers.0.", "model.mtp_block.0.", "model.layers.2.", "model.layers.1.mtp_block."]
)
def test_their_experts_are_counted_apart(prefix: str, tmp_path: Path) -> None:
    """By name, or by a number beyond the last decoder layer."""
    tensors = {
        f"{prefix}mlp.experts.0.up_proj.weight": torch.zeros(4, 8),
        f"{prefix}mlp.shared_experts.up_proj.weight": torch.zeros(4, 4),
        f"{prefix}eh_proj.weight": torch.zeros(2, 4, dtype=torch.bfloat16),
    }
    save_file({**PACKED, **OWN, **tensors}, tmp_path / "model.safetensors")
    found = prediction_size([tmp_path / "model.safetensors"], 2)
    assert found == PredictionSize(total=128 + 64 + 16, experts=128)
    assert found.describe().endswith("as they were, 128 of them their unquantized experts")


def test_other_parts_are_none(tmp_path: Path) -> None:
    """A vision tower may have more layers than the text model, in a list of its own."""
    visual = {f"model.visual.blocks.{i}.mlp.experts.0.weight": torch.zeros(4) for i in range(8)}
    visual |= {f"vision.layers.{i}.weight": torch.zeros(4) for i in range(8)}
    save_file({**PACKED, **OWN, **visual}, tmp_path / "model.safetensors")
    assert prediction_size([tmp_path / "model.safetensors"], 2) == PredictionSize()
    assert PredictionSize().describe() == ""


def test_the_depth_is_that_of_the_text_model() -> None:
    assert depth_of({"num_hidden_layers": 8, "text_config": {"num_hidden_layers": 2}}) == 2
    assert depth_of({"num_hidden_layers": 3}) == 3
    assert depth_of({"num_hidden_layers": "3"}) is None
