"""Multimodal models of every family, calibrated on conversations with images, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multimodal_support import FAMILIES, TEMPLATE, Processor, build, image_inputs, logits, tokenizer
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaProcessor,
    Qwen3MoeConfig,
)

from bitsmoe_plugin import BitsMoEConfig, ConfigError, QuantizationError
from bitsmoe_plugin.cli import main
from bitsmoe_plugin.commands import times
from bitsmoe_plugin.commands.compare.texts import check_texts
from bitsmoe_plugin.commands.evaluate import evaluate_path, load_for_evaluation
from bitsmoe_plugin.integrations.dequantize_checkpoint import dequantize_checkpoint
from bitsmoe_plugin.integrations.optimum import BitsMoEQuantizer
from bitsmoe_plugin.models.model_class import auto_class, empty_model, text_model
from bitsmoe_plugin.models.model_source import ModelSource

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:no tokenizer saved")
OPTIONS: dict[str, Any] = {"method": "paper-v2", "basis_bits": 4, "basis_group_size": 16, "bits": 8}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six conversations with an image each, and one without."""
    folder, random = tmp_path_factory.mktemp("chat"), np.random.default_rng(0)
    rows = [{"messages": [{"role": "user", "content": "w11 w12 " * 10}]}]
    for i in range(6):
        pixels = random.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        words = " ".join(f"w{token}" for token in random.integers(10, 64, 10))
        content = [{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": words}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": words}]
        rows.append({"messages": messages})
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "chat.jsonl"


@pytest.mark.parametrize("family", FAMILIES)
def test_images_give_the_same_after_loading(family: str, chat: Path, tmp_path: Path) -> None:
    """Guards against parts of a multimodal model that are lost or renamed on the way."""
    dense, inputs = build(family), image_inputs(family, 2)
    dense.save_pretrained(tmp_path / "dense")
    config = BitsMoEConfig(
        dataset=str(chat), sequence_length=32, tokenizer=Processor(family), work_dir=tmp_path / "w", **OPTIONS
    )
    packed = AutoModelForMultimodalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    again = load_for_evaluation(str(tmp_path / "packed"))
    assert type(again) is type(dense)
    found, wanted = logits(again, inputs), logits(dense, inputs)
    assert torch.equal(found, logits(packed, inputs))
    assert float((found - wanted).norm() / wanted.norm()) < 0.15  # 8 bits; routers of random models tip over
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dequantized")
    whole = load_for_evaluation(str(tmp_path / "dequantized"))
    assert float((logits(whole, inputs) - found).norm() / found.norm()) < 1e-4
    names = load_file(tmp_path / "packed" / "model.safetensors")
    # Kimi's rule for its vision tower would call them blocks, which nothing but transformers reads.
    assert all(".layers." in name for name in names if "bitsmoe" in name)
    again.save_pretrained(tmp_path / "resaved")
    assert load_file(tmp_path / "resaved" / "model.safetensors").keys() == names.keys()
    tokens = inputs["input_ids"]
    assert text_model(again)(tokens).logits.shape == (1, tokens.shape[1], 64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama4 with a processor that needs no torchvision: 4 tokens for an image."""
    path = tmp_path_factory.mktemp("llama4") / "dense"
    build("llama4").save_pretrained(path)
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(path)
    (path / "LICENSE").write_text("free")
    return path


def test_every_command(saved: Path, chat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A multimodal model from the command line, with images; what lies beside its weights stays with it."""
    text, out, tuned = tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "tuned"
    text.write_text("\n".join(json.dumps({"text": "w11 w12 w13 w14 " * 20}) for _ in range(4)))
    options = ["--option", "basis_group_size=16", "--option", "basis_bits=4", "--method", "paper-v2"]
    sizes = ["--bits", "6", "--sequence-length", "32", *options]
    assert main(["quantize", str(saved), str(out), "--dataset", str(chat), *sizes]) == 0
    beside = {"LICENSE", "chat_template.jinja", "processor_config.json", "generation_config.json"}
    assert beside <= {path.name for path in out.iterdir()}
    assert (out / "processor_config.json").read_bytes() == (saved / "processor_config.json").read_bytes()
    assert isinstance(AutoProcessor.from_pretrained(out), LlavaProcessor)
    common = ["--dataset", str(text), "--sequence-length", "32"]
    tuning = ["--epochs", "1", "--held-out", "0.2", "--reference", str(saved), *common]
    assert main(["tune", str(out), str(tuned), *tuning]) == 0
    assert beside <= {path.name for path in tuned.iterdir()}
    assert main(["evaluate", str(tuned), "--reference", str(saved), "--json", *common]) == 0
    output = capfd.readouterr().out
    measured = json.loads(output[output.index("{") :])
    # The same numbers as of the causal language model in it.
    result = evaluate_path(str(out), str(text), sequence_length=32)
    assert result.tokens == measured["tokens"]
    assert main(["inspect", str(tuned)]) == main(["estimate", str(saved), *options]) == 0
    assert main(["evaluate", str(out), "--dataset", str(chat), "--sequence-length", "32"]) == 2
    assert "holds images, and only text is read here" in capfd.readouterr().err


def test_commands_that_read_a_multimodal_model(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Comparing, the report, and optimum, which write what the others do."""
    text, out, again = tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "again"
    text.write_text("\n".join(json.dumps({"text": "w11 w12 w13 w14 " * 20}) for _ in range(4)))
    common = ["--dataset", str(text), "--sequence-length", "32", "--bits", "6"]
    assert main(["quantize", str(saved), str(out), *common, "--option", "basis_group_size=16"]) == 0
    options = {"sequence_length": 32, "bits": 6.0, "basis_group_size": 16}
    BitsMoEQuantizer.from_pretrained(saved).quantize(again, dataset=str(text), **options)
    written = {path.name: path.read_bytes() for path in out.iterdir() if path.name != times.FILE}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == written
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    capfd.readouterr()
    prompt = ["--prompt", "w11 w12", "--new-tokens", "2", "--group-size", "16"]
    comparing = ["--methods", "rtn,bitsmoe", "--eval", str(text), "--json", *prompt]
    assert main(["compare", str(saved), *common, *comparing]) == 0
    rows = json.loads(capfd.readouterr().out)["results"]
    assert [row["method"] for row in rows] == ["rtn", "bitsmoe"]
    assert all(row["kl_divergence"] < 0.1 and row["sample"] for row in rows)


def test_images_calibrate_what_is_compared(
    saved: Path, chat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They were refused, as for methods that read text alone; those still are, by name."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "w11 w12 w13 w14 " * 20}) for _ in range(4)))
    common = ["compare", str(saved), "--sequence-length", "32", "--bits", "6", "--json"]
    assert main([*common, "--methods", "bitsmoe", "--dataset", str(chat), "--eval", str(text)]) == 0
    (row,) = json.loads(capfd.readouterr().out)["results"]
    assert row["kl_divergence"] < 0.1
    assert main([*common, "--methods", "rtn", "--dataset", str(text), "--eval", str(chat)]) == 2
    assert "holds images, and only text is read here" in capfd.readouterr().err
    source = ModelSource.of(str(saved))
    with pytest.raises(ConfigError, match="method gptq calibrates on text alone"):
        check_texts(source, empty_model(source.config()), str(chat), str(text), ["gptq"], None)


def test_the_language_model_alone_has_the_same_perplexity(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from bitsmoe_plugin.commands.evaluate import evaluate_model, evaluation_text

    build("qwen3_5_moe").save_pretrained(tmp_path)
    tokens = torch.randint(10, 64, (4, 32), generator=torch.Generator().manual_seed(1)).tolist()
    texts = evaluation_text(tokens, None, sequence_length=32, max_tokens=None)
    models = [load_for_evaluation(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path).eval()]
    assert type(models[0]) is not type(models[1])
    results = [evaluate_model(model, texts) for model in models]
    assert results[0] == results[1]


def test_a_processor_that_is_missing(chat: Path, tmp_path: Path) -> None:
    """One line that names what to do, before any weight is read."""
    build("gemma4").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = BitsMoEConfig(dataset=str(chat), sequence_length=32, **OPTIONS)
    with pytest.raises(ConfigError, match="the dataset holds images, but") as error:
        AutoModelForMultimodalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "\n" not in str(error.value)


def test_a_class_without_a_head_is_refused() -> None:
    """Guards against a head of random weights, which transformers would add with a warning."""
    config = Qwen3MoeConfig(architectures=["Qwen3MoeForSequenceClassification"])
    with pytest.raises(
        QuantizationError, match=r"names Qwen3MoeForSequenceClassification, .* Qwen3MoeForCausalLM"
    ):
        auto_class(config)
