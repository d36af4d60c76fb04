"""Conversations with images: read, made model inputs of, and carried through a model layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal_support import FAMILIES, IMAGE, Processor, build, image_inputs, logits
from PIL import Image
from torch import Tensor, nn

from bitsmoe_plugin import ConfigError, QuantizationError
from bitsmoe_plugin.calibration.blocks import (
    ConversationBlocks,
    blocks_digest,
    held_out_last,
    take,
    token_count,
)
from bitsmoe_plugin.calibration.conversations import check_takes_images, conversation_blocks, holds_images
from bitsmoe_plugin.calibration.documents import load_documents
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.calibration.text import token_blocks
from bitsmoe_plugin.models.families import find_moe_layers

PICTURE = Image.new("RGB", (20, 24), (200, 30, 60))
SIZES: dict[str, Any] = {"sequence_length": 32, "max_tokens": 10_000, "vocab_size": 64}


def _row(part: dict[str, Any], text: str = "w11 w12") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": text}]}]}


def _layers(model: Any) -> nn.ModuleList:
    layers = model.get_submodule(find_moe_layers(model)[0].layer_name.rpartition(".")[0])
    assert isinstance(layers, nn.ModuleList)
    return layers


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_model_with_images(family: str) -> None:
    """Guards against features of images that reach no layer, or positions of text where images are: what the
    last layer puts out is, bit for bit, what it puts out in the model's own forward pass."""
    model, inputs = build(family), [image_inputs(family, 1), image_inputs(family, 2, text=5, seed=1)]
    layers, wanted = _layers(model), []
    handle = layers[-1].register_forward_hook(lambda *call: wanted.append(call[-1]))
    before = [logits(model, block) for block in inputs]
    handle.remove()
    other = {**inputs[0], "pixel_values": 1 - inputs[0]["pixel_values"]}
    assert float((logits(model, other) - before[0]).norm() / before[0].norm()) > 0.01  # images matter
    deltas = getattr(model.base_model, "rope_deltas", None)
    forward = LayerwiseForward(model, layers, ConversationBlocks(inputs), batch_size=8)
    for index in range(len(layers)):
        forward.advance(forward.run(index))
    assert all(torch.equal(a, b) for a, b in zip(forward.hidden, wanted, strict=True))
    assert getattr(model.base_model, "rope_deltas", None) is deltas
    assert torch.equal(logits(model, inputs[1]), before[1])


def test_what_is_no_addition_between_layers_is_refused() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            hidden = self.layers[0](input_ids[..., None].float().expand(-1, -1, 4))
            return self.layers[1](2 * hidden)

    model = Doubling()
    with pytest.raises(QuantizationError, match="between decoder layers 0 and 1 by something else than"):
        LayerwiseForward(model, model.layers, torch.ones(1, 3, dtype=torch.int64), batch_size=1)


def test_one_block_per_conversation(tmp_path: Path) -> None:
    """Paths are those beside the file; every way to give an image gives the same block."""
    PICTURE.save(tmp_path / "a.png")
    parts = [{"type": "image", "path": "a.png"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(_row(part)) for part in parts))
    rows = [{"type": "image", "image": PICTURE, "path": None}, {"type": "image"}]
    listed = [_row(rows[0]), {**_row(rows[1]), "images": [PICTURE]}]
    for documents in (load_documents(path), load_documents(listed), load_documents(iter(listed))):
        assert holds_images(documents)
        blocks = conversation_blocks(documents, Processor("qwen3_vl_moe"), **SIZES)
        assert [block["input_ids"].shape for block in blocks] == [(1, 9)] * 2
        assert torch.equal(blocks[0]["pixel_values"], blocks[1]["pixel_values"])
        assert token_count(blocks) == 18
    changed = ConversationBlocks([{**blocks[0], "pixel_values": blocks[0]["pixel_values"] + 1}, blocks[1]])
    assert blocks_digest(changed) != blocks_digest(blocks)


def test_held_out_conversations_come_last() -> None:
    blocks = ConversationBlocks({"input_ids": torch.full((1, 3), i)} for i in range(8))
    moved, seen = held_out_last(blocks, 0.25)
    values = [int(block["input_ids"][0, 0]) for block in moved]
    assert seen == 6
    assert values == [0, 1, 3, 4, 5, 7, 2, 6]
    assert token_count(take(moved, seen)) == 18


def test_text_is_cut_and_images_never_are() -> None:
    """Guards against placeholders that were cut off from their image."""
    part, words = {"type": "image", "image": PICTURE}, "w11 " * 60
    documents = load_documents([_row(part, words), {"messages": [{"role": "user", "content": words}]}])
    blocks = conversation_blocks(documents, Processor("llama4"), tokens_of_images={IMAGE}, **SIZES)
    assert [block["input_ids"].shape[1] for block in blocks] == [32, 32]
    late = load_documents(
        [_row(part), {"messages": [{"role": "user", "content": [{"type": "text", "text": words}, part]}]}]
    )
    with pytest.warns(
        UserWarning, match=r"1 conversations .* longer than sequence_length 32, such as dataset\[1\]"
    ):
        blocks = conversation_blocks(late, Processor("llama4"), tokens_of_images={IMAGE}, **SIZES)
    assert len(blocks) == 1
    with pytest.raises(QuantizationError, match=r"none fits\. a sequence_length of 9 takes all"):
        conversation_blocks(
            load_documents([_row(part)]), Processor("llama4"), **{**SIZES, "sequence_length": 5}
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            _row({"type": "video", "video": "a.mp4"}),
            r"dataset\[0\]: .* type 'video'; .* no video and no audio",
        ),
        (_row({"type": "input_audio", "audio": "a.wav"}), "no video and no audio"),
        (_row({"type": "image"}), r"dataset\[0\]: a part of type 'image' says nowhere"),
        ({**_row({"type": "image"}), "images": [PICTURE] * 2}, "'images' holds 1 more than"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        load_documents([row])


def test_images_where_only_text_is_read() -> None:
    documents = load_documents([_row({"type": "image", "image": PICTURE})])
    with pytest.raises(
        QuantizationError, match=r"dataset\[0\]: the conversation holds images, and only text"
    ):
        token_blocks(documents, Processor("llama4").tokenizer, **SIZES)


def test_processors_that_refuse() -> None:
    processor = Processor("llama4")
    documents = load_documents([_row({"type": "image", "path": "missing.png"})])
    with pytest.raises(QuantizationError, match=r"dataset\[0\]: the processor refuses it"):
        conversation_blocks(documents, processor, **SIZES)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="processor has no chat template"):
        conversation_blocks(documents, processor, **SIZES)


def test_a_language_model_alone_takes_no_images(moe_tiny: Any) -> None:
    with pytest.raises(ConfigError, match="Qwen3MoeForCausalLM does not take"):
        check_takes_images(moe_tiny)
