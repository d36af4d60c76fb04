"""What tests of tuning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.commands.quantize import quantize_to_directory

TEXT = str(Path(__file__).parents[2] / "examples" / "data" / "calibration.jsonl")


@pytest.fixture(scope="module")
def packed(packed_moe_tiny: Path) -> Any:
    """In float32; tests change copies."""
    return AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def packed_small(small_moe_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_moe_tiny`` at 3 bits, for tests of commands that tune it in seconds."""
    out = tmp_path_factory.mktemp("small") / "packed"
    config = BitsMoEConfig(bits=3, method="fast", dataset=TEXT, calibration_tokens=1024, sequence_length=64)
    quantize_to_directory(str(small_moe_tiny), out, config)
    return out


@pytest.fixture(scope="module")
def blocks(moe_tiny: Any) -> Tensor:
    """Sixteen blocks that the unquantized model itself finds likely."""
    start = torch.randint(0, 4096, (16, 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return moe_tiny.generate(start, do_sample=True, max_new_tokens=47, min_new_tokens=47, pad_token_id=0)
