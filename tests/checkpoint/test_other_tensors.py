"""The record of the tensors that are not packed matches the files, whatever saving does to names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, CheckpointError
from bitsmoe_plugin.checkpoint.other_tensors import fingerprint, verify_others

# tied embeddings; a router that is renamed on saving; a decoder layer without experts
FAMILIES = {"qwen3_moe": {"tie_word_embeddings": True}, "mixtral": {}, "deepseek_v2": {}}


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_the_record_fits_what_is_saved(family: str, shard: str, tiny_model, tmp_path: Path) -> None:
    tiny_model(family, **FAMILIES[family]).save_pretrained(tmp_path / "dense")
    tokens = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    options = {"method": "paper-v2", "basis_bits": 4, "basis_group_size": 16, "sequence_length": 16}
    config = BitsMoEConfig(bits=8, dataset=tokens.tolist(), **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "packed", max_shard_size=shard)
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    recorded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed"
    ).config.quantization_config.other_tensors
    assert len(recorded) > 10
    verify_others(files, recorded, {}, {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0).view(2, 3), "b.bitsmoe_payload": torch.zeros(2)}, tmp_path / "file")
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "a is missing"),
        ({"a": torch.arange(6.0).view(3, 2)}, "a differs"),
        ({"a": torch.arange(6.0).view(2, 3).double()}, "a differs"),
        ({"a": torch.arange(6.0).view(2, 3), "c": torch.zeros(1)}, "c is in the checkpoint, but was not"),
    ],
)
def test_what_differs_is_refused_by_name(file: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    recorded = {"a": fingerprint(load_file(file)["a"])}
    verify_others([file], recorded, {}, {})
    save_file({**tensors, "b.bitsmoe_payload": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=message):
        verify_others([file], recorded, {}, {})


def test_a_checkpoint_without_a_record_is_not_checked(file: Path) -> None:
    verify_others([file], {}, {}, {})
