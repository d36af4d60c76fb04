"""Calibration text, and the layer-by-layer forward pass against the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward, capture_layer
from bitsmoe_plugin.calibration.text import load_documents, token_blocks, token_stream
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers

TEXTS = ["first text", "second\u2028text, \u00e4", ""]
END = SimpleNamespace(eos_token_id=9)
"""Stands in for a tokenizer where the documents are token ids already."""


def datasets_dataset(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def test_every_accepted_type_gives_its_documents(tmp_path: Path) -> None:
    """All types named in the documentation, with characters that trip line splitting."""
    text, jsonl = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text(TEXTS[1], encoding="utf-8")
    rows = [json.dumps({"text": t, "id": 3}, ensure_ascii=False) for t in TEXTS]
    jsonl.write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    ids = [[1, 2, 3], [4]]
    assert load_documents(TEXTS) == load_documents(tuple(TEXTS)) == TEXTS
    assert load_documents(ids) == load_documents([torch.tensor(i) for i in ids]) == ids
    assert load_documents(str(text)) == load_documents(text) == [TEXTS[1]]
    assert load_documents(jsonl) == load_documents(str(jsonl)) == TEXTS
    assert load_documents(datasets_dataset({"text": TEXTS, "n": [1, 2, 3]})) == TEXTS
    assert load_documents(datasets_dataset({"input_ids": ids})) == ids


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "empty"),
        (["a", [1]], "mixes types"),
        ([["a"]], "mixes types"),
        ([1, 2, 3], "mixes types"),
        ([None], "mixes types"),
        (b"bytes", "mixes types"),
        (7, "is a int; allowed"),
        ({"text": ["a"]}, "is a dict; allowed"),
        (None, "is a NoneType; allowed"),
        ("no/such/file.txt", "no/such/file.txt does not exist"),
    ],
)
def test_bad_dataset_is_refused(dataset: Any, message: str) -> None:
    """One clear error instead of a failure deep inside the tokenizer."""
    with pytest.raises(QuantizationError, match=message):
        load_documents(dataset)


def test_dataset_without_text_names_its_columns() -> None:
    with pytest.raises(QuantizationError, match=r"columns \['content'\].*'text' or 'input_ids'"):
        load_documents(datasets_dataset({"content": ["a"]}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\t", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"content": "a"}\n', "line 3: an object with a string 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: an object with a string 'text'"),
        ("a.jsonl", b'["text"]\n', "line 1: an object with a string 'text'"),
        ("a.csv", b"text\n", r"a\.csv: allowed are \.txt and \.jsonl"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt.*UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl.*UTF-8"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Names the file, and the line where there is one."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantizationError, match=message):
        load_documents(tmp_path / name)


def test_documents_are_joined_with_the_end_token() -> None:
    """Documents must not run into each other; the limit cuts exactly."""
    documents = [[1, 2], [3], [4, 5, 6]]
    assert token_stream(documents, END) == [1, 2, 9, 3, 9, 4, 5, 6, 9]
    assert token_stream(documents, None) == [1, 2, 3, 4, 5, 6]
    assert token_stream(documents, END, limit=4) == [1, 2, 9, 3]


def test_documents_that_fill_a_block_are_sampled_whole() -> None:
    """Their end was a piece of its own, and came instead of the text for half of the documents."""
    documents = [[number] * 8 for number in range(10, 20)]
    given = {"sequence_length": 8, "max_tokens": 40, "vocab_size": 20}
    stream = token_blocks(documents, END, **given).flatten().tolist()
    ends = [place for place, token in enumerate(stream) if token == 9]
    assert ends == [8, 17, 26, 35]
    assert len(set(stream)) == 6
    with pytest.raises(QuantizationError, match="no tokenizer"):
        token_stream(["text"], None)


def blocks_of(count: int, length: int, most: int = 1000) -> Tensor:
    return token_blocks([list(range(count))], None, sequence_length=length, max_tokens=most, vocab_size=100)


def test_blocks_are_cut_in_order_and_the_remainder_is_dropped() -> None:
    """Guards the boundaries: no token lost, doubled or padded."""
    assert torch.equal(blocks_of(17, 8), torch.arange(16).view(2, 8))
    assert torch.equal(blocks_of(16, 8), torch.arange(16).view(2, 8))
    assert blocks_of(40, 8, most=31).shape == (3, 8)
    assert blocks_of(40, 8, most=32).shape == (4, 8)
    with pytest.raises(QuantizationError, match="7 tokens, fewer than one sequence of 8"):
        blocks_of(7, 8)


def test_text_is_sampled_from_all_documents() -> None:
    """More text than is used: a piece of every document before a second one of any, none twice; which and in
    what order depends on the seed alone."""
    documents = [[100 * d + i for i in range(40)] for d in range(8)]

    def sample(most: int, seed: int = 0) -> Tensor:
        return token_blocks(documents, None, sequence_length=8, max_tokens=most, vocab_size=1000, seed=seed)

    few = sample(64)
    assert sorted((few[:, 0] // 100).tolist()) == list(range(8))
    assert torch.equal(few, sample(64))
    assert not torch.equal(few, sample(64, seed=1))
    many = sample(128)
    assert torch.equal(many[:8], few)
    assert len(many.unique()) == 128
    assert torch.equal(sample(320), torch.tensor(documents).view(-1, 8))


def test_ids_outside_the_vocabulary_are_refused() -> None:
    """Text tokenized for another model would index past the embedding; the error names the id."""
    for ids, wrong in (([0, 99, 100, 3], "100"), ([0, -1, 50, 3], "-1")):
        with pytest.raises(QuantizationError, match=rf"token id {wrong}\b.*99"):
            token_blocks([ids], None, sequence_length=4, max_tokens=4, vocab_size=100)


def record_outputs(model: nn.Module, blocks: Tensor, batch_size: int) -> list[Tensor]:
    """Outputs of every decoder layer in the model's own forward pass."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]

    def keep(index: int):
        return lambda _module, _args, out: seen[index].append(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for batch in blocks.split(batch_size):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen]


def check_layerwise(model: nn.Module, blocks: Tensor, batch_size: int) -> None:
    """The same operations on the same batches: equal to float32 rounding."""
    expected = record_outputs(model, blocks, batch_size)
    before = list(model.model.layers)
    forward = LayerwiseForward(model, model.model.layers, blocks, batch_size)
    assert list(model.model.layers) == before, "the recorders were left in the model"
    for index, wanted in enumerate(expected):
        outputs = forward.run(index)
        torch.testing.assert_close(torch.cat(outputs), wanted, rtol=1e-5, atol=1e-5)
        forward.advance(outputs)
    forward.restart()
    torch.testing.assert_close(torch.cat(forward.run(0)), expected[0], rtol=1e-5, atol=1e-5)


def test_layerwise_forward_is_the_models_forward(moe_tiny) -> None:
    """Guards masks and position embeddings; the last batch is smaller than the others."""
    check_layerwise(moe_tiny, torch.randint(4096, (5, 48)), batch_size=2)


def test_layers_of_different_kinds_keep_their_own_arguments(tiny_model) -> None:
    """Guards against one mask for all layers: here every other one sees a window of 4 tokens."""
    kinds = ["full_attention", "sliding_attention"]
    model = tiny_model("qwen2_moe", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    check_layerwise(model, torch.randint(64, (3, 16)), batch_size=2)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_layerwise_forward_of_other_families(tiny_model, model_type: str) -> None:
    """Families pass different arguments to their layers (sliding windows, latent attention)."""
    check_layerwise(tiny_model(model_type), torch.randint(64, (3, 16)), batch_size=2)


def test_layers_are_put_back_when_the_model_fails(moe_tiny) -> None:
    """Guards against a model that is left without its layers after an error."""
    before = list(moe_tiny.model.layers)
    with pytest.raises(IndexError):
        LayerwiseForward(moe_tiny, moe_tiny.model.layers, torch.full((1, 8), 10**6), 1)
    assert list(moe_tiny.model.layers) == before


class Limited:
    """A hook that lets a layer run out of memory with more than so many blocks, its experts done."""

    def __init__(self, blocks: int, machine: bool) -> None:
        self.blocks, self.machine, self.calls = blocks, machine, 0

    def __call__(self, _layer: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
        self.calls += 1
        if len(args[0]) > self.blocks:
            if self.machine:
                torch.empty(2**60)  # the real error of the machine's own memory
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("machine", [False, True])
def test_out_of_memory_goes_on_with_fewer_blocks(moe_tiny, machine: bool) -> None:
    """Guards against lost and doubled tokens: the same statistics, the same batches, and a warning."""
    blocks = torch.randint(4096, (7, 16))
    layers, experts = moe_tiny.model.layers, find_moe_layers(moe_tiny)[1].module
    wanted = LayerwiseForward(moe_tiny, layers, blocks, 5)
    wanted.advance(wanted.run(0))
    seen, outputs = capture_layer(wanted, 1, experts, "residual")
    forward = LayerwiseForward(moe_tiny, layers, blocks, 5)
    forward.advance(forward.run(0))
    limited = Limited(1, machine)
    handle = layers[1].register_forward_hook(limited)
    try:
        with pytest.warns(UserWarning, match=r"out of memory in decoder layer 1: .* 1 instead of 2 "):
            again, fewer = capture_layer(forward, 1, experts, "residual")
        assert limited.calls == 1 + 1 + 7
        forward.run(1)
        assert limited.calls == 1 + 1 + 7 + 7, "layers after it should not run out of memory again"
    finally:
        handle.remove()
    assert [len(batch) for batch in fewer] == [len(batch) for batch in outputs] == [5, 2]
    torch.testing.assert_close(fewer, outputs, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.top_k_index, seen.top_k_index)
    torch.testing.assert_close(again.hidden, seen.hidden, rtol=1e-5, atol=1e-5)


def test_out_of_memory_with_one_block_says_what_to_do(moe_tiny) -> None:
    forward = LayerwiseForward(moe_tiny, moe_tiny.model.layers, torch.randint(4096, (2, 16)), 1)
    handle = moe_tiny.model.layers[0].register_forward_hook(Limited(0, machine=False))
    try:
        with pytest.raises(QuantizationError, match="layer 0 with one block of 16 tokens; use a smaller"):
            forward.run(0)
    finally:
        handle.remove()


def test_other_errors_of_a_layer_stay_what_they_are(moe_tiny) -> None:
    """Guards against a second try that hides a mistake."""
    forward = LayerwiseForward(moe_tiny, moe_tiny.model.layers, torch.randint(4096, (2, 16)), 2)
    with pytest.raises(RuntimeError, match="size"):
        forward.run(0, [torch.zeros(2, 16, 3)])


@pytest.mark.parametrize("token_weighting", ["residual", "none"])
def test_an_infinite_residual_is_not_taken_for_a_token_of_no_weight(token_weighting: str, moe_tiny) -> None:
    """Guards the reciprocal: 1 / inf is an ordinary number. 1e20 is finite, its square is not."""
    forward = LayerwiseForward(moe_tiny, moe_tiny.model.layers, torch.randint(4096, (1, 16)), 1)
    forward.hidden[0] = forward.hidden[0].clone()
    forward.hidden[0][0, 3] = 1e20
    seen, _ = capture_layer(forward, 0, find_moe_layers(moe_tiny)[0].module, token_weighting)
    assert bool(seen.token_weights[3].isnan())


@pytest.mark.parametrize("token_weighting", ["residual", "none"])
def test_capture_sees_what_the_experts_are_called_with(moe_tiny, token_weighting: str) -> None:
    """Inputs, routing and residual weights of layer 2, against a hook on a normal forward pass."""
    blocks = torch.randint(4096, (4, 32))
    experts = find_moe_layers(moe_tiny)[2].module
    calls: list[tuple] = []
    handle = experts.register_forward_pre_hook(lambda _module, args: calls.append(args))
    residual = record_outputs(moe_tiny, blocks, 2)[2]
    handle.remove()

    forward = LayerwiseForward(moe_tiny, moe_tiny.model.layers, blocks, 2)
    for index in range(2):
        forward.advance(forward.run(index))
    seen, outputs = capture_layer(forward, 2, experts, token_weighting)
    hidden, index, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
    torch.testing.assert_close(seen.hidden, hidden, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen.top_k_index, index)
    torch.testing.assert_close(seen.top_k_weights, weights.float())
    torch.testing.assert_close(torch.cat(outputs), residual, rtol=1e-5, atol=1e-5)
    energy = residual.square().mean(-1).flatten()
    wanted = 1 / energy if token_weighting == "residual" else (1 / energy.mean()).expand(len(energy))
    torch.testing.assert_close(seen.token_weights, wanted, rtol=1e-4, atol=0)
    assert not experts._forward_pre_hooks, "the hook was left in the model"
