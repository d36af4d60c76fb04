"""The README.md that a packed checkpoint is written with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.commands.model_card import model_card, record_evaluation, write_model_card
from bitsmoe_plugin.integrations.transformers import quantize_to_directory

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:no tokenizer saved")


@pytest.fixture(scope="module")
def packed(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("secret-path")
    tiny_model("qwen3_moe").bfloat16().save_pretrained(directory / "base")
    tokens = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(1)).tolist()
    config = BitsMoEConfig(bits=6.0, dataset=tokens, sequence_length=32, basis_group_size=16)
    quantize_to_directory(str(directory / "base"), directory / "small-6bit", config)
    return directory / "small-6bit"


def test_card_says_what_is_stored_and_how_to_load_it(packed: Path) -> None:
    """Numbers are those of ``inspect``; nothing tells where on the machine it was made."""
    card = ModelCard.load(packed / "README.md")
    report = inspect_checkpoint(packed)
    for text in (
        f"{report['bits_per_weight']:.3f} bits per weight",
        f"| rounded rows | {report['parts']['payload']:.4f} |",
        f"{report['calibration']['tokens']:,} tokens",
        report["calibration"]["sha256"][:16],
        'from_pretrained("DIR")',
        "vllm serve DIR --quantization bitsmoe",
        "experts of base in",
    ):
        assert text in card.text
    assert "secret-path" not in str(card)
    assert card.data.library_name == "transformers"
    assert "bitsmoe" in card.data.tags
    assert card.data.base_model is None
    assert "{" not in card.text


def test_a_model_of_the_hub_is_named_as_the_base(packed: Path) -> None:
    data = model_card(packed, "someone/model").data
    assert data.base_model == "someone/model"
    assert data.base_model_relation == "quantized"


def test_the_users_own_text_stays(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for file in packed.iterdir():
        if file.name != "README.md":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    write_model_card(tmp_path, "someone/model")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_was_measured_replaces_what_was_measured_before_and_nothing_else(packed: Path) -> None:
    before = (packed / "README.md").read_text()
    assert "Nothing yet" in before
    first = {"dataset": "a.txt", "sequence_length": 8, "perplexity": 12.5, "tokens": 7000, "per_domain": {}}
    second = {
        **first,
        "perplexity": 11.25,
        "reference": "base",
        "kl_divergence": 0.5,
        "top1_agreement": 0.75,
        "kl_median": 0.25,
        "kl_99": 1.5,
        "kl_999": 2.5,
        "probability_change": 0.0625,
        "routing_change": 0.375,
        "routing_change_by_layer": {"model.layers.0.mlp.experts": 0.25, "model.layers.1.mlp.experts": 0.5},
        "tasks": {"arc": {"acc": 0.5, "acc_stderr": 0.25, "samples": 4}},
    }
    for result in (first, second):
        record_evaluation(packed, result)
    card = (packed / "README.md").read_text()
    for text in (
        "7,000 tokens in blocks of 8: **11.250**",
        "0.5000 nats",
        "75.0 %",
        "| 0.2500 | 1.5000 | 2.5000 | 6.25 % |",
        "37.5 % of the tokens, mean of the layers; from the first layer to the last: 25.0, 50.0 %.",
        "| arc | acc | 0.5000 | 0.2500 |",
    ):
        assert text in card
    assert "12.5" not in card
    assert card.split("## Measured")[0] == before.split("## Measured")[0]
    del second["routing_change"], second["routing_change_by_layer"]
    record_evaluation(packed, {**second, "routing_unknown": "model type 'x' has none"})
    assert "is not known: model type 'x' has none" in (packed / "README.md").read_text()
    (packed / "README.md").write_text("mine\n")
    record_evaluation(packed, first)
    assert (packed / "README.md").read_text().startswith("mine\n\n## Measured")
    (packed / "README.md").write_text(before)
