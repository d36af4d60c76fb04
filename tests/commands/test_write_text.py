"""Text that a model writes itself, as a dataset for quantizing and tuning it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.calibration.text import load_documents, token_blocks, token_stream
from bitsmoe_plugin.commands import write_text as module
from bitsmoe_plugin.commands.write_text import write_text
from bitsmoe_plugin.errors import ConfigError, QuantizationError
from bitsmoe_plugin.integrations.transformers import quantize_to_directory

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "moe-tiny")
DATA = EXAMPLES / "data" / "eval.jsonl"
LENGTH, PROMPT, COUNT = 48, 8, 5
SIZES = {"sequence_length": LENGTH, "prompt_tokens": PROMPT}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few documents, which are tokenized at once."""
    path = tmp_path_factory.mktemp("text") / "few.jsonl"
    path.write_text("\n".join(DATA.read_text(encoding="utf-8").splitlines()[:4]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def written(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a last batch that is smaller than the others, and tokens that fill no sequence."""
    out = tmp_path_factory.mktemp("written") / "new" / "own.jsonl"
    assert write_text(MODEL, out, str(text), COUNT * LENGTH + 7, batch_size=3, **SIZES) == COUNT
    assert [path.name for path in out.parent.iterdir()] == ["own.jsonl"]
    return out


def rows(path: Path) -> list[list[int]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(line) == {"input_ids"} for line in lines)
    return [line["input_ids"] for line in lines]


def copied(folder: Path) -> Path:
    shutil.copytree(MODEL, folder)
    return folder


def test_sequences_go_on_from_pieces_of_the_text(written: Path, text: Path) -> None:
    stream = token_stream(load_documents(str(text)), AutoTokenizer.from_pretrained(MODEL))
    pieces = {tuple(stream[i : i + PROMPT]) for i in range(len(stream) - PROMPT + 1)}
    found = rows(written)
    assert [len(row) for row in found] == [LENGTH] * COUNT
    assert {tuple(row[:PROMPT]) for row in found} <= pieces
    assert len({tuple(row[:PROMPT]) for row in found}) == COUNT
    assert not any(tuple(row[-PROMPT:]) in pieces for row in found)  # the rest is the model's


def test_it_is_a_dataset_that_quantizes(
    written: Path, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    documents = load_documents(str(written))
    assert list(documents) == rows(written)
    options = {"sequence_length": LENGTH, "max_tokens": 10**6, "vocab_size": 4096}
    assert token_blocks(documents, None, **options).tolist() == rows(written)
    tiny_model("qwen3_moe", vocab_size=4096).save_pretrained(tmp_path / "model")
    options = {"bits": 8, "method": "fast", "basis_group_size": 16, "allow_thin": True, "held_out": 0.25}
    config = BitsMoEConfig(dataset=str(written), sequence_length=LENGTH, **options)
    quantize_to_directory(str(tmp_path / "model"), tmp_path / "packed", config)
    assert (tmp_path / "packed" / "model.safetensors").is_file()


def test_the_seed_decides_and_the_process_does_not(written: Path, text: Path, tmp_path: Path) -> None:
    """Random numbers of the process are neither used nor moved."""
    arguments: Any = (str(text), COUNT * LENGTH)
    options: Any = {"batch_size": 3, **SIZES}
    torch.manual_seed(123)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        write_text(MODEL, tmp_path / "same.jsonl", *arguments, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    write_text(MODEL, tmp_path / "other.jsonl", *arguments, seed=1, **options)
    assert (tmp_path / "same.jsonl").read_bytes() == written.read_bytes()
    assert not {tuple(row) for row in rows(tmp_path / "other.jsonl")} & {tuple(row) for row in rows(written)}


def test_generation_defaults_of_the_model_are_left_out(written: Path, text: Path, tmp_path: Path) -> None:
    """Instruct models bring some: text would be greedy, and end at an end-of-text token of theirs."""
    ends = sorted({row[PROMPT + 4] for row in rows(written)})
    defaults = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0, "do_sample": True}
    model = copied(tmp_path / "model")
    (model / "generation_config.json").write_text(
        json.dumps(defaults | {"eos_token_id": ends, "suppress_tokens": ends, "num_beams": 2})
    )
    out = tmp_path / "out.jsonl"
    write_text(model, out, str(text), COUNT * LENGTH, batch_size=3, **SIZES)
    assert out.read_bytes() == written.read_bytes()


def test_all_of_the_vocabulary_is_sampled_by_temperature(tmp_path: Path) -> None:
    """Guards against the default top_k of transformers, 50. All prompts are the same: there is no other."""
    (tmp_path / "one.txt").write_text("The sea was calm", encoding="utf-8")
    documents = load_documents(str(tmp_path / "one.txt"))
    length = len(token_stream(documents, AutoTokenizer.from_pretrained(MODEL)))
    options: Any = {"sequence_length": length + 1, "prompt_tokens": length, "batch_size": 256}
    found = {}
    for temperature in (0.01, 100):
        out = tmp_path / f"{temperature}.jsonl"
        data = str(tmp_path / "one.txt")
        write_text(MODEL, out, data, 256 * (length + 1), temperature=temperature, **options)
        found[temperature] = len({row[-1] for row in rows(out)})
    assert found[0.01] < 3
    assert found[100] > 200  # of 256 draws from 4,096 tokens, about evenly: 248


def test_command_prints_path_and_count(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "own.jsonl"
    given = ["--tokens", "100", "--sequence-length", "32", "--device", "cpu", "--seed", "3"]
    status, stdout, stderr = run_here(capfd, "write", MODEL, str(out), "--dataset", str(text), *given)
    assert (status, stdout) == (0, ""), stderr
    assert stderr.splitlines()[-1] == f"{out}: 3 sequences of 32 tokens"
    assert "Writing text: 100%" in stderr
    assert len(rows(out)) == 3


def test_an_interrupted_run_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Bar, "put", stop)
    given = ["--dataset", str(text), "--tokens", "600"]
    status, _, stderr = run_here(capfd, "write", MODEL, str(tmp_path / "a" / "own.jsonl"), *given)
    assert (status, list(tmp_path.iterdir())) == (130, [])
    assert "nothing was written" in stderr.splitlines()[-1]


def test_an_interrupted_run_goes_on_to_the_same_text(
    written: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not with other arguments. What was finished is not written again."""
    generate, batches = module._written, []

    def interrupted(writer: Any, prompts: torch.Tensor, *rest: Any) -> torch.Tensor:
        batches.append(len(prompts))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(writer, prompts, *rest)

    monkeypatch.setattr(module, "_written", interrupted)
    out = tmp_path / "own.jsonl"
    sizes = ["--sequence-length", str(LENGTH), "--prompt-tokens", str(PROMPT), "--batch-size", "3"]
    command = ["write", MODEL, str(out), "--dataset", str(text), *sizes, "--device", "cpu"]
    tokens = ["--tokens", str(COUNT * LENGTH)]
    status, _, stderr = run_here(capfd, *command, *tokens)
    assert (status, [path.name for path in tmp_path.iterdir()]) == (130, ["own.jsonl.work"])
    assert "own.jsonl.work holds what is finished. Start the same again" in stderr.splitlines()[-1]
    for changed, message in ((["--seed", "1"], "seed was 0, is 1"), (["--tokens", "48"], "prompts was 5, ")):
        status, _, stderr = run_here(capfd, *command, *tokens, *changed)
        assert status == 2
        assert "holds the text of another run: " in stderr.splitlines()[-1]
        assert message in stderr.splitlines()[-1]
    status, _, stderr = run_here(capfd, *command, *tokens)
    assert (status, batches) == (0, [3, 2, 2]), stderr
    assert out.read_bytes() == written.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


@pytest.mark.parametrize("moment", ["_prompts", "_batches"])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    moment: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run with the same name that ended before this one began, or before it ended."""
    out, call = tmp_path / "own.jsonl", getattr(module, moment)

    def other_run(*given: Any) -> Any:
        out.write_text("precious")
        return call(*given)

    monkeypatch.setattr(module, moment, other_run)
    with pytest.raises(QuantizationError, match=r"own\.jsonl exists"):
        write_text(MODEL, out, str(text), LENGTH, **SIZES)
    assert out.read_text() == "precious"


def test_outputs_that_are_not_finite_are_refused(text: Path, tmp_path: Path) -> None:
    model = copied(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizationError, match="not finite"):
        write_text(model, tmp_path / "own.jsonl", str(text), 100, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


REFUSED: dict[str, tuple[list[str], str]] = {
    "file that exists": (["OUT=there.jsonl"], "there.jsonl exists; choose another name or remove it"),
    "name of no dataset": (["OUT=own.json"], "own.json needs a name that ends in .jsonl"),
    "folder in a file": (["OUT=there.jsonl/own.jsonl"], "there.jsonl/own.jsonl cannot be written"),
    "less than a sequence": (["--tokens", "511"], "tokens=511 are fewer than one sequence of 512"),
    "more than the model reads": (
        ["--sequence-length", "1025", "--tokens", "2000"],
        "sequence_length=1025 is beyond the 1024 positions",
    ),
    "prompt alone": (["--sequence-length", "16"], "prompt_tokens=16 leave nothing to write"),
    "frozen": (["--temperature", "0.001"], "temperature=0.001 is not allowed"),
    "boiling": (["--temperature", "101"], "temperature=101.0 is not allowed"),
    "no text": (["--dataset", "no.txt"], "dataset file no.txt does not exist"),
    "less than a prompt": (["--dataset", "short.txt"], "tokens, fewer than one prompt of 16"),
    "token ids": (["--dataset", "there.jsonl"], "token ids or conversations; give a .txt file"),
    "packed": (["MODEL=bitsmoe"], "quantized (quant_method 'bitsmoe'); the model that it was made from"),
    "of GPTQ": (["MODEL=gptq"], "quantized (quant_method 'gptq'); the model that it was made from"),
    "no language model": (["MODEL=bert"], "config.json names BertModel"),
    "encoder-decoder": (["MODEL=switch_transformers"], "is an encoder-decoder model (switch_transformers)"),
    "another one": (["MODEL=t5gemma2"], "is an encoder-decoder model (t5gemma2)"),
    "no weights": (["MODEL=qwen3_moe"], "has neither model.safetensors.index.json nor model.safetensors"),
}


def broken_model(name: str, folder: Path) -> str:
    """A directory with a config alone."""
    if name in ("bitsmoe", "gptq"):
        config = json.loads((Path(MODEL) / "config.json").read_text())
        config["quantization_config"] = {"quant_method": name, "bits": 2}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    else:
        config = AutoConfig.for_model(name)
        config.architectures = ["BertModel"] if name == "bert" else None
        config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_before_weights_are_read(
    case: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_for_evaluation", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "there.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    (tmp_path / "short.txt").write_text("three words here")
    changes, message = REFUSED[case]
    out, model, flags = "own.jsonl", MODEL, []
    for change in changes:
        name, _, value = change.partition("=")
        if name == "OUT":
            out = value
        elif name == "MODEL":
            model = broken_model(value, tmp_path / "model")
        else:
            flags.append(change)
    given = ["--dataset", str(text), "--tokens", "512", "--sequence-length", "512", *flags]
    status, stdout, stderr = run_here(capfd, "write", model, out, *given)
    line = stderr.splitlines()[-1]
    assert (status, stdout, line.startswith("bitsmoe: error: ")) == (2, "", True), stderr
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "model") == [
        "short.txt",
        "there.jsonl",
    ]


def test_several_processes_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would write the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        write_text(MODEL, tmp_path / "own.jsonl", str(text), 512)
