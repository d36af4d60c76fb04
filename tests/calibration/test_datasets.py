"""Datasets in the forms that users have them: what is read of them, and what is refused, and where."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.calibration.text import load_documents, token_blocks, token_stream
from bitsmoe_plugin.commands.evaluate import evaluation_text
from bitsmoe_plugin.errors import BitsMoEError, ConfigError, QuantizationError

datasets = pytest.importorskip("datasets")
MODEL = Path(__file__).parents[2] / "examples" / "moe-tiny"
PADDED = {
    "input_ids": [[5, 6, 7, 0, 0], [0, 0, 0, 8, 9]],
    "attention_mask": [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]],
}
UNPADDED = [[5, 6, 7], [8, 9]]
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.extra is defined %}!{% endif %}{% endfor %}"
    "{{ tools | length if tools }}{{ ending }}"
)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def blocks(dataset: Any, tokenizer: Any = None, length: int = 8, most: int = 64, **options: Any) -> Tensor:
    documents = load_documents(dataset, max_tokens=most, sequence_length=length)
    return token_blocks(
        documents, tokenizer, sequence_length=length, max_tokens=most, vocab_size=10**6, **options
    )


def rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("kind", ["list", "bool", "float", "torch", "numpy", "batches of one", "iterator"])
def test_the_mask_leaves_padding_out(kind: str) -> None:
    """Padding on either side, masks of any type: 91 % of the calibration tokens were padding."""
    found = rows(PADDED)
    if kind in ("bool", "float"):
        cast = {"bool": bool, "float": float}[kind]
        found = [{**row, "attention_mask": [cast(m) for m in row["attention_mask"]]} for row in found]
    elif kind == "torch":
        found = [{name: torch.tensor(v) for name, v in row.items()} for row in found]
    elif kind == "numpy":
        found = [{name: np.array(v) for name, v in row.items()} for row in found]
    elif kind == "batches of one":
        found = [{name: torch.tensor([v]) for name, v in row.items()} for row in found]
    documents = load_documents(iter(found) if kind == "iterator" else found)
    assert documents == UNPADDED
    assert all(type(token) is int for document in documents for token in document)


@pytest.mark.parametrize("form", [None, "torch", "numpy", "pandas", "arrow"])
def test_a_format_is_but_a_view(form: str | None) -> None:
    """Rows of tensors, arrays and tables; also of the token ids alone, without their mask."""
    dataset = datasets.Dataset.from_dict({**PADDED, "other": ["a", "b"]})
    assert load_documents(dataset.with_format(form)) == UNPADDED
    assert load_documents(dataset.with_format(form, columns=["input_ids"])) == UNPADDED
    assert load_documents(dataset.to_iterable_dataset().with_format(form)) == UNPADDED


def test_a_transform_of_the_user_stays() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
    changed = dataset.with_transform(
        lambda batch: {"input_ids": [torch.tensor([7, 8]) for _ in batch["text"]]}
    )
    assert load_documents(changed) == [[7, 8], [7, 8]]


@pytest.mark.parametrize(
    ("ids", "special", "wanted"),
    [
        ([0, 0, 5, 6, 0, 7, 0, 0], {"pad": 0, "eos": 9}, [5, 6, 0, 7]),
        ([5, 6, 9, 9, 9], {"pad": 9, "eos": 9}, [5, 6, 9]),
        ([9, 9, 5, 6, 9], {"eos": 9}, [9, 5, 6, 9]),
        ([5, 6, 9, 0, 0], {"pad": 0, "eos": 9}, [5, 6, 9]),
        ([1, 5, 6, 1, 1], {"pad": 1, "bos": 1}, [1, 5, 6, 1]),
        ([0, 0], {"pad": 0}, []),
        ([5, 0, 0], {}, [5, 0, 0]),
    ],
)
def test_padding_without_a_mask_is_known_by_the_tokenizer(
    ids: list[int], special: dict[str, int], wanted: list[int]
) -> None:
    """A token that only pads goes from both ends; of one that also ends texts one may be the text's own."""
    named = SimpleNamespace(**{f"{name}_token_id": token for name, token in special.items()})
    end = [special["eos"]] if "eos" in special else []
    assert token_stream([ids], named) == wanted + end


def test_unknown_padding_gets_a_warning() -> None:
    padded = [[*range(10 + i, 14 + i), *[0] * 28] for i in range(8)]
    with pytest.warns(UserWarning, match=r"token 0 is 88 % of the calibration tokens; if it is padding"):
        blocks(padded, most=1024)


def test_padding_of_the_tokenizer_itself_is_off(tokenizer: Any) -> None:
    """Guards tokenizers that were saved with padding or truncation on, and padded rows of a real one."""
    texts = ["one", "some more text than that"]
    wanted = token_stream(texts, tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    assert token_stream(texts, tokenizer) == wanted
    padded = tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")
    for columns in (padded, {"input_ids": padded["input_ids"]}):  # by its mask, or by what it pads with
        documents = load_documents(datasets.Dataset.from_dict(dict(columns)))
        assert token_stream(documents, tokenizer) in (wanted, _with_ends(texts, tokenizer))


def _with_ends(texts: list[str], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return [token for text in texts for token in [*tokenizer(text).input_ids, end, end]]


class Counted:
    """An endless dataset that knows how much of it was read."""

    def __init__(self, texts: list[Any]) -> None:
        self.texts, self.count = texts, 0

    def __iter__(self) -> Any:
        for text in itertools.cycle(self.texts):
            self.count += 1
            if self.count > 50_000:
                raise RuntimeError("read on and on")
            yield {"text": text}


@pytest.mark.parametrize("kind", ["datasets", "generator", "iterable"])
def test_an_endless_stream_is_read_as_far_as_needed(kind: str, tokenizer: Any) -> None:
    """Once, in order, with a choice of twice as much; the same each time."""
    texts = [
        f"{number} bottles of beer on the wall, take one down and pass it around" for number in range(999)
    ]
    found = []
    for _ in range(2):
        counted = Counted(texts)
        stream: Any = iter(counted) if kind == "generator" else counted
        if kind == "datasets":
            stream = datasets.IterableDataset.from_generator(lambda counted=counted: iter(counted))
        found.append(blocks(stream, tokenizer, length=32, most=2048))
        assert 100 < counted.count < 1000
    assert torch.equal(*found)
    assert found[0].shape == (64, 32)


@pytest.mark.filterwarnings("ignore:token .* of the calibration tokens")
def test_a_stream_goes_on_where_text_has_fewer_tokens_than_expected(tokenizer: Any) -> None:
    """Guards the guess of characters per token: a run of spaces is one token or few."""
    counted = Counted([f"{' ' * 4000}word {number}" for number in range(50)])
    assert blocks(counted, tokenizer, length=8, most=4096).numel() == 4096


def test_a_stream_that_ends_gives_what_it_has(tokenizer: Any) -> None:
    texts = ["a few words"] * 5
    assert torch.equal(blocks(iter(texts), tokenizer, most=10**6), blocks(texts, tokenizer, most=10**6))


def test_a_stream_without_text_is_given_up() -> None:
    with pytest.raises(QuantizationError, match="10000 documents without text"):
        load_documents(Counted([""]))


def test_what_datasets_give_as_columns_is_read() -> None:
    """``dataset["text"]`` is no list, and a tensor may hold all documents."""
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "input_ids": [[1, 2], [3, 4]]})
    assert load_documents(dataset["text"]) == ["a", "b"]
    assert load_documents(dataset["input_ids"]) == [[1, 2], [3, 4]]
    assert load_documents(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert load_documents(np.array(["a", "b"])) == ["a", "b"]


def test_evaluation_of_a_stream_takes_its_first_tokens(tokenizer: Any) -> None:
    texts = ["some text, and more of it"] * 400
    (whole,) = evaluation_text(texts, tokenizer, sequence_length=16, max_tokens=512)
    (found,) = evaluation_text(Counted(texts), tokenizer, sequence_length=16, max_tokens=512)
    assert torch.equal(found.blocks, whole.blocks)
    with pytest.raises(ConfigError, match="may have no end; give max_tokens"):
        evaluation_text(Counted(texts), tokenizer, sequence_length=16, max_tokens=None)


def test_conversations_go_through_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    """In every form, with arguments; keys without a value, which datasets add, are left out."""
    tokenizer.chat_template = TEMPLATE
    text = "<user>one<assistant>two"
    wanted = token_stream([text], tokenizer)
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT, "domain": "talk"}) + "\n")
    uneven = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "x", "extra": "y"}]}]
    for dataset in ([CHAT], [{"messages": CHAT}], datasets.Dataset.from_list(uneven).select([0]), file):
        assert token_stream(load_documents(dataset), tokenizer) == wanted
    tools = [{"messages": CHAT, "tools": [{"name": "f"}, {"name": "g"}]}]
    assert token_stream(load_documents(tools), tokenizer) == token_stream([f"{text}2"], tokenizer)
    options = {"chat_template_kwargs": {"ending": " the end"}}
    assert token_stream(load_documents(file), tokenizer, **options) == token_stream(
        [f"{text} the end"], tokenizer
    )
    few = {"sequence_length": len(wanted), "max_tokens": None}
    (found,) = evaluation_text(file, tokenizer, **few)
    assert (found.domain, found.blocks.tolist()) == ("talk", [wanted])


def test_a_template_that_is_missing_or_refuses_is_named(tokenizer: Any) -> None:
    documents = load_documents([CHAT, CHAT[:1]])
    with pytest.raises(ConfigError, match=r"no chat template; take the tokenizer of an instruct model"):
        token_stream(documents, tokenizer)
    strict = "{% if messages|length != 2 %}{{ raise_exception('two are needed') }}{% endif %}x"
    options = {"chat_template_kwargs": {"chat_template": strict}}
    with pytest.raises(QuantizationError, match=r"dataset\[1\]: the chat template refuses.*two are needed"):
        token_stream(documents, tokenizer, **options)


@pytest.mark.parametrize("value", ["{}", [1], {1: 2}, {"tokenize": True}, {"padding": True}])
def test_arguments_of_the_template_are_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"chat_template_kwargs=.* is not allowed"):
        BitsMoEConfig(chat_template_kwargs=value)


ONE = datasets.Dataset.from_dict({"text": ["a"]})
SPLITS = datasets.DatasetDict({"train": ONE, "test": ONE})
STREAMS = datasets.IterableDatasetDict({"a": ONE.to_iterable_dataset()})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (SPLITS, r"a DatasetDict with the splits 'train', 'test'; give one of them, like dataset\['train'\]"),
        (STREAMS, r"a IterableDatasetDict with the splits 'a'; .*dataset\['a'\]"),
        ([{"text": "a"}, {"text": None}], r"dataset\[1\]: .* string 'text' is needed, not None"),
        ([{"content": "a"}], r"columns \['content'\]"),
        (["a", "b\ud800"], r"dataset\[1\]: character 1 is '\\ud800', a lone surrogate"),
        ([[1, 2], [3, -100]], r"dataset\[1\] holds -100, which is no token id"),
        ([[1, 2], [True]], r"dataset\[1\] holds True"),
        ([[1, 2], [1.5]], r"dataset\[1\] holds 1.5"),
        ([[[1, 2], [3, 4]]], r"dataset\[0\] holds lists in a list"),
        ([torch.rand(3)], r"dataset\[0\] holds 0\."),
        (["a", [1]], r"dataset\[1\] is a list, those before are of type str"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"'attention_mask' has 1 values and 'input_ids' 2"),
        ([{"input_ids": [1, 2], "attention_mask": [0, -1e9]}], "needed are 0 for padding, 1 for tokens"),
        ([{"messages": [{"from": "human", "value": "a"}]}], r"dataset\[0\]: 'messages' is .*\"role\""),
        ([{"messages": []}], r"dataset\[0\]: 'messages' is \[\]"),
        (iter([{"text": "a"}, {"text": 3}]), r"document 1 of the stream \(from 0\): .* not 3"),
        ({"a", "b"}, "is a set; allowed"),
        (PADDED, r"is a dict; allowed: .*from_dict"),
        (["", ""], "dataset is empty"),
        (iter([]), "dataset is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_its_place(dataset: Any, message: str) -> None:
    """Before any work begins, and never as an error of a tokenizer or of torch."""
    with pytest.raises(QuantizationError, match=message):
        load_documents(dataset)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": "\\udc00"}\r\n', r"a\.jsonl, line 3: .*lone surrogate"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n{"text": "b"}\n', r"line 2: 'messages' is None"),
        ("a.jsonl", b'{"input_ids": [1, "2"]}\n', r"a\.jsonl, line 1: 'input_ids' holds '2'"),
        ("a.jsonl.gz", b"", r"allowed are \.txt and \.jsonl files, unpacked; .*load_dataset"),
        ("a.parquet", b"PAR1", r"allowed are \.txt and \.jsonl"),
        ("a.json", b"[]", r"allowed are \.txt and \.jsonl"),
    ],
)  # fmt: skip
def test_what_a_file_holds_is_refused_by_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantizationError, match=message):
        load_documents(tmp_path / name)


def test_files_of_rows(tmp_path: Path) -> None:
    """A byte order mark, line ends of Windows, token ids with a mask."""
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in rows(PADDED)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load_documents(file) == UNPADDED


def test_what_a_tokenizer_refuses_is_named(tmp_path: Path) -> None:
    """Tokenizers raise what they like, far from any line number."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')

    def refusing(text: str, **options: Any) -> dict[str, list[int]]:
        if text == "b":
            raise TypeError("TextInputSequence must be str")
        return {"input_ids": [1]}

    with pytest.raises(
        QuantizationError, match=r"a\.jsonl, line 3: the tokenizer refuses .*TextInputSequence"
    ):
        token_stream(load_documents(file), refusing)


@pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:no tokenizer")
def test_from_pretrained_takes_streams_and_refuses_text_before_weights(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator cannot be copied, as transformers copies configs; a bad row is found before weights are."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    small = {"calibration_tokens": 512, "sequence_length": 32, "bits": 6, "basis_bits": 8}
    stream = (torch.randint(0, 64, (40,)) for _ in itertools.count())
    config = BitsMoEConfig(dataset=stream, **small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.config.quantization_config.calibration["tokens"] == 480
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)  # calling it would fail
    with pytest.raises(BitsMoEError, match=r"dataset\[1\] holds -100"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsMoEConfig(dataset=[[1], [-100]], **small)
        )
