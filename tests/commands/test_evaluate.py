"""Perplexity with strides, divergence from a reference, and tasks of lm-eval on files, without a network."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import run_here
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from wheel_support import run_python

from bitsmoe_plugin import ConfigError
from bitsmoe_plugin.commands.evaluate import EvaluationText, evaluate_model, evaluate_text, evaluation_text
from bitsmoe_plugin.commands.evaluate_tasks import evaluate_tasks, language_model
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.tokenizer import load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "moe-tiny")
EVAL = str(EXAMPLES / "data" / "eval.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A directory with a task of lm-eval: which of two words goes on with a sentence of the model's text."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "eval.jsonl").read_text().splitlines()]
    words = [row["text"].split() for row in rows if len(row["text"].split()) > 80][:24]
    examples = [
        {"text": " ".join(here[:40]), "right": here[40], "wrong": there[57]}
        for here, there in zip(words, words[1:] + words[:1], strict=True)
    ]
    data = tmp_path / "next_word.json"
    data.write_text("\n".join(map(json.dumps, examples)))
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "next_word.yaml").write_text(f"""
task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    # Its own tasks are thousands of files, which take seconds to read; processes of their own do.
    ours = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("bitsmoe_plugin.commands.evaluate_tasks.TaskManager", ours)
    return directory


def test_a_model_without_a_tokenizer_is_refused(tmp_path) -> None:
    """transformers makes one up that has no vocabulary: every text would be nothing, for calibration too."""
    shutil.copy(Path(MODEL) / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer was found at .* has 1 tokens"):
        load_tokenizer(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (12, 1), (8, 7)])
def test_strides_score_every_token_once_in_the_context_of_the_guide(moe_tiny, length, stride) -> None:
    """Token by token: the window that scores it is the first that has it. Also the end, in a shorter one."""
    tokens = torch.randint(0, 4096, (43,), generator=torch.Generator().manual_seed(1))
    loss, count = 0.0, 0
    for position in range(1, len(tokens)):
        window = max(0, -(-(position + 1 - length) // stride))
        start = window * stride
        if start == position:
            continue  # nothing before it
        logits = moe_tiny(tokens[None, start : start + length]).logits[0].double().log_softmax(-1)
        loss -= float(logits[position - 1 - start, tokens[position]])
        count += 1
    texts = evaluation_text([tokens.tolist()], None, sequence_length=length, max_tokens=None, stride=stride)
    result = evaluate_model(moe_tiny, texts)
    assert result.tokens == count
    assert result.perplexity == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-4)


def test_more_context_lowers_perplexity(moe_tiny, tokenizer) -> None:
    blocks, strided = (
        evaluate_text(moe_tiny, tokenizer, EVAL, sequence_length=64, max_tokens=2000, stride=stride)
        for stride in (None, 16)
    )
    assert strided.perplexity < 0.97 * blocks.perplexity


@pytest.mark.parametrize("stride", [0, 65, -1])
def test_strides_without_meaning_are_refused(moe_tiny, tokenizer, stride) -> None:
    with pytest.raises(ConfigError, match=f"stride={stride} is not allowed; allowed: from 1 to .*, 64"):
        evaluate_text(moe_tiny, tokenizer, EVAL, sequence_length=64, stride=stride)


@torch.no_grad()
def test_log_likelihoods_are_of_float32_and_the_model_keeps_its_dtype(tokenizer) -> None:
    """lm-eval's default softmax is in the dtype of the logits: bfloat16 has three digits."""
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    context, continuation = "In the beginning there was", " the word and the word was with me"
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    (found, _), *_ = language_model(model, tokenizer, 1).loglikelihood([request])
    assert model.dtype == torch.bfloat16
    start = len(tokenizer(context)["input_ids"])
    tokens = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    logits = model(tokens).logits[0, :-1]
    exact, coarse = (
        float(logits.to(dtype).log_softmax(-1).gather(-1, tokens[0, 1:, None])[start - 1 :].float().sum())
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert found == pytest.approx(exact, abs=1e-3)
    assert abs(coarse - exact) > 1e-2


@torch.no_grad()
def test_a_local_task_counts_right_answers(tasks, tokenizer, packed_moe_tiny) -> None:
    """Against the same choices scored by hand."""
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny).eval()
    right = 0
    for line in (tasks.parent / "next_word.json").read_text().splitlines():
        row, scores = json.loads(line), []
        for word in (row["right"], row["wrong"]):
            start = len(tokenizer(row["text"])["input_ids"])
            tokens = torch.tensor([tokenizer(f"{row['text']} {word}")["input_ids"]])
            logits = model(tokens).logits[0, :-1].float().log_softmax(-1)
            scores.append(float(logits.gather(-1, tokens[0, 1:, None])[start - 1 :].sum()))
        right += scores[0] > scores[1]
    result = evaluate_tasks(model, tokenizer, ["next_word"], task_dir=tasks, batch_size=1)
    assert result["next_word"]["samples"] == 24
    assert result["next_word"]["acc"] == pytest.approx(right / 24)
    assert 0 < result["next_word"]["acc_stderr"] < 0.2
    first = evaluate_tasks(model, tokenizer, ["next_word"], task_dir=tasks, limit=5)
    assert first["next_word"]["samples"] == 5


def make_last_word():
    spec = importlib.util.spec_from_file_location("make_last_word", EXAMPLES / "make_last_word.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bundled_task_is_what_its_script_makes_of_text_that_calibration_does_not_see() -> None:
    """Guards a file that was edited by hand, and examples that a calibrated model has seen."""
    script = make_last_word()
    assert (EXAMPLES / "data" / "last_word.jsonl").read_bytes() == script.FILE.read_bytes() == script.build()
    rows = [json.loads(line) for line in script.FILE.read_text().splitlines()]
    documents = {row["id"]: " ".join(row["text"].split()) for row in script.read("eval.jsonl")}
    seen = " ".join(" ".join(row["text"].split()) for row in script.read("calibration.jsonl"))
    assert len(rows) == 799
    assert {row["domain"] for row in rows} == {"fiction", "religion"}
    for row in rows:
        whole = f"{row['text']} {row['word']}"
        assert re.search(re.escape(whole) + "[.!?]", documents[row["id"]])
        assert whole not in seen
        assert len(row["text"].split()) >= 30


def test_sentences_end_where_they_do() -> None:
    text = 'Mr. Darcy bowed.  "Is it so?" said he. See ver. 4. "No!"\nShe went.'
    ends = ["Mr. Darcy bowed.", '"Is it so?" said he.', "See ver. 4.", '"No!"', "She went."]
    assert make_last_word().sentences(text) == ends


@torch.no_grad()
def test_the_bundled_task_asks_for_the_last_word(tokenizer, moe_tiny, monkeypatch, tmp_path) -> None:
    """Accuracy against words predicted by hand, and without a network or a cache of data sets."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lines = make_last_word().FILE.read_text().splitlines()[:40]
    right, loss = 0, 0.0
    for row in map(json.loads, lines):
        start = len(tokenizer(row["text"])["input_ids"])
        tokens = torch.tensor([tokenizer(f"{row['text']} {row['word']}")["input_ids"]])
        logits = moe_tiny(tokens).logits[0, start - 1 : -1].float().log_softmax(-1)
        right += bool((logits.argmax(-1) == tokens[0, start:]).all())
        loss -= float(logits.gather(-1, tokens[0, start:, None]).sum())
    found = evaluate_tasks(moe_tiny, tokenizer, ["last_word"], limit=40)["last_word"]
    assert found["samples"] == 40
    assert found["acc"] == pytest.approx(right / 40)
    assert found["perplexity"] == pytest.approx(math.exp(loss / 40), rel=2e-2)
    assert not (tmp_path / "home").exists()


def test_a_task_of_the_users_takes_precedence(tasks, moe_tiny, tokenizer) -> None:
    """Of the same name as the bundled one."""
    text = (tasks / "next_word.yaml").read_text().replace("task: next_word", "task: last_word")
    (tasks / "last_word.yaml").write_text(text)
    (tasks / "next_word.yaml").unlink()
    assert evaluate_tasks(moe_tiny, tokenizer, ["last_word"], task_dir=tasks)["last_word"]["samples"] == 24


def bitsmoe(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bitsmoe_plugin", "evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_everything_from_the_command_line(tasks, packed_moe_tiny, capfd) -> None:
    options = ["--dataset", EVAL, "--max-tokens", "2000", "--sequence-length", "128", "--stride", "96"]
    options += ["--reference", MODEL, "--tasks", "next_word", "--task-dir", str(tasks)]
    done = bitsmoe(str(packed_moe_tiny), *options, "--json")
    result = json.loads(done.stdout)
    assert 40 < result["perplexity"] < 90
    assert 0.001 < result["kl_divergence"] < 0.5
    assert 0.5 < result["top1_agreement"] < 1
    assert result["tasks"]["next_word"]["acc"] > 0.4
    _, out, errors = run_here(capfd, "evaluate", MODEL, *options)
    assert "KL divergence from the reference: 0.0000" in out, errors
    assert all(text in out for text in ("next_word", "acc", "100.0 %", "perplexity"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --dataset TEXT for perplexity, --tasks NAMES"),
        (["--tasks", "next_wrod", "--task-dir", "TASKS"], "did you mean next_word"),
        (["--tasks", "next_word", "--task-dir", "none"], "task directory none does not exist"),
        (["--tasks", "next_word", "--stride", "5"], "--stride belongs to --dataset"),
        (["--dataset", EVAL, "--limit", "5"], "--limit belongs to --tasks"),
        (["--dataset", EVAL, "--reference", "OTHER"], "has 64 tokens in its vocabulary"),
    ],
)
def test_bad_arguments_give_one_error_line(tasks, tiny_model, tmp_path, arguments, message, capfd) -> None:
    if "OTHER" in arguments:
        tiny_model("qwen3_moe").save_pretrained(tmp_path / "other")
    places = {"TASKS": str(tasks), "OTHER": str(tmp_path / "other")}
    given = (places.get(argument, argument) for argument in arguments)
    status, stdout, stderr = run_here(capfd, "evaluate", MODEL, *given)
    assert status == 2, stderr
    assert message in stderr
    assert "Traceback" not in stderr
    assert stdout == ""


def test_lm_eval_itself_finds_packed_checkpoints(installed_wheel, tasks, packed_moe_tiny, tmp_path) -> None:
    """Its own program, as its users call it; it reads the quantization config before it loads the model."""
    code = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = ["--model", "hf", "--model_args", f"pretrained={packed_moe_tiny},softmax_dtype=float32"]
    arguments += ["--tasks", "next_word", "--include_path", str(tasks), "--device", "cpu", "--limit", "4"]
    environment = {name: os.environ[name] for name in ("HF_HOME", "HF_HUB_OFFLINE")}
    done = run_python(installed_wheel, "-c", code, *arguments, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "next_word" in done.stdout
    assert "newly initialized" not in done.stderr


def test_the_bundled_task_is_in_the_wheel_with_its_licences(installed_wheel, tmp_path) -> None:
    code = (
        "from bitsmoe_plugin.commands.bundled_tasks import FOLDER, last_word; "
        "from bitsmoe_plugin.commands.evaluate_tasks import find_tasks; find_tasks(['last_word']); "
        "print(len(last_word.dataset()['test']), 'Chip Chapin' in (FOLDER / 'SOURCES.md').read_text())"
    )
    done = run_python(installed_wheel, "-c", code, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.split() == ["799", "True"], done.stderr


def test_outputs_that_are_not_finite_have_no_perplexity(moe_tiny_path) -> None:
    """As of a model with massive activations in float16."""
    model = AutoModelForCausalLM.from_pretrained(moe_tiny_path, dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1e6)
    with pytest.raises(QuantizationError, match=r"not finite.*torch\.float16.*float32"):
        evaluate_model(model, [EvaluationText("a", torch.arange(24).view(2, 12))])


def test_scored_tokens_are_the_last_of_a_block(moe_tiny) -> None:
    """``scored`` counts from the end; the whole block is context."""
    blocks = torch.arange(24).view(2, 12)
    parts = [EvaluationText("a", blocks, 4), EvaluationText("a", blocks[:, :8])]
    whole = evaluate_model(moe_tiny, [EvaluationText("a", blocks)])
    together = evaluate_model(moe_tiny, parts)
    assert together.tokens == whole.tokens == 22
    assert together.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
