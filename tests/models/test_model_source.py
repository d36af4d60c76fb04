"""A tokenizer comes from where its model comes from: folder, revision, cache, code; by every way in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.commands.compare.method import run_method
from bitsmoe_plugin.commands.compare.task import ComparisonTask
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.commands.evaluate import evaluate_path
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.tokenizer import UntrustedCodeError, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token")
EXAMPLES = Path(__file__).parents[2] / "examples"
NAME, MAIN, OTHER = "someone/moe", "0" * 40, "1" * 40
SMALL = {"bits": 6.0, "calibration_tokens": 512, "sequence_length": 64}
FLAGS = ["--bits", "6", "--calibration-tokens", "512", "--sequence-length", "64", "--option", "basis_bits=8"]
CODE = """
from transformers import PreTrainedTokenizer

class LettersTokenizer(PreTrainedTokenizer):
    def __init__(self, eos_token="~", **options):
        super().__init__(eos_token=eos_token, **options)
    @property
    def vocab_size(self):
        return 256
    def get_vocab(self):
        return {chr(i): i for i in range(256)}
    def _tokenize(self, text, **options):
        return list(text)
    def _convert_token_to_id(self, token):
        return ord(token) % 256
    def _convert_id_to_token(self, index):
        return chr(index)
    def save_vocabulary(self, directory, filename_prefix=None):
        return ()
"""
AUTO_MAP = {"AutoTokenizer": ["letters.LettersTokenizer", None]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    lines = (EXAMPLES / "data" / "calibration.jsonl").read_text().splitlines()[:8]
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the tokenizer of the bundled one."""
    folder = tmp_path_factory.mktemp("model") / "instruct"
    tiny_model("qwen3_moe", vocab_size=4096).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "moe-tiny" / name, folder)
    return folder


def with_other_tokenizer(model: Path, folder: Path) -> Path:
    """A copy whose tokenizer gives other ids to the same text."""
    shutil.copytree(model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab, special = tokenizer["model"]["vocab"], {t["content"] for t in tokenizer["added_tokens"]}
    names = [name for name in vocab if name not in special]
    vocab.update(zip(names, [vocab[name] for name in names[1000:] + names[:1000]], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def nested(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model in a folder, and at its root another tokenizer."""
    root = with_other_tokenizer(model, tmp_path_factory.mktemp("nested") / "root")
    shutil.copytree(model, root / "instruct")
    return root


@pytest.fixture(scope="module")
def cache(model: Path, nested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache: revision main with other tokenizers than revision "right", where it is in a folder."""
    folder = tmp_path_factory.mktemp("hub") / "models--someone--moe"
    with_other_tokenizer(model, folder / "snapshots" / MAIN)
    with_other_tokenizer(model, folder / "snapshots" / MAIN / "instruct")
    shutil.copytree(nested, folder / "snapshots" / OTHER)
    (folder / "refs").mkdir()
    for ref, commit in (("main", MAIN), ("right", OTHER)):
        (folder / "refs" / ref).write_text(commit)
    return folder.parent


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def calibrated_on(model: Any) -> str:
    return model.config.quantization_config.calibration["sha256"]


def quantized(name: str | Path, text: str, **options: Any) -> str:
    """Hash of the tokens that a model was calibrated on."""
    config = BitsMoEConfig(dataset=text, basis_bits=8, **SMALL)
    return calibrated_on(AutoModelForCausalLM.from_pretrained(name, quantization_config=config, **options))


@pytest.fixture(scope="module")
def wanted(model: Path, text: str) -> str:
    return quantized(model, text)


@pytest.mark.parametrize("settings", ["fp8", ["fp8"], 8])
def test_settings_that_are_no_object(settings: Any, model: Path, tmp_path: Path) -> None:
    """Guards users of commands against an AttributeError of transformers."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    for door in (ModelSource.of(folder).config, lambda: estimate(folder, BitsMoEConfig())):
        with pytest.raises(CheckpointError, match=r"config\.json is damaged \(its quantization_config is a"):
            door()


def test_from_pretrained_takes_the_tokenizer_beside_the_weights(
    nested: Path, cache: Path, text: str, wanted: str
) -> None:
    """Guards calibration on tokens that the model does not know: KL was five times as large, no warning."""
    assert quantized(nested, text) != wanted
    assert quantized(nested, text, subfolder="instruct") == wanted
    hub = {"cache_dir": cache, "local_files_only": True, "subfolder": "instruct"}
    assert quantized(NAME, text, **hub) != wanted
    assert quantized(NAME, text, **hub, revision="right") == wanted
    (nested / "empty").mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(nested / "instruct" / file, nested / "empty")
    with pytest.raises(
        ConfigError, match=r"no tokenizer was found: at .*empty there is none.*give tokenizer="
    ):
        quantized(nested, text, subfolder="empty")


def test_the_command_line_finds_what_it_is_told(
    nested: Path, cache: Path, text: str, wanted: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub = ["--cache-dir", str(cache), "--revision", "right", "--subfolder", "instruct"]
    ways = {"folder": [str(nested), "--subfolder", "instruct"], "hub": [NAME, *hub]}
    for way, (name, *flags) in ways.items():
        out = tmp_path / way
        status, _, printed = run_here(
            capfd, "quantize", name, str(out), "--dataset", text, "--eval", text, *FLAGS, *flags
        )
        assert status == 0, printed
        assert read_config(out).calibration["sha256"] == wanted
        saved = json.loads((out / "tokenizer.json").read_text())
        assert saved["model"] == json.loads((nested / "instruct" / "tokenizer.json").read_text())["model"]
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == (
        tmp_path / "hub" / "model.safetensors"
    ).read_bytes()
    measure = ["--dataset", text, "--max-tokens", "512", "--sequence-length", "64", "--json"]
    found = []
    for name, *flags in (*ways.values(), [str(nested / "instruct")]):
        status, printed, error = run_here(capfd, "evaluate", name, *measure, *flags)
        assert status == 0, error
        found.append(json.loads(printed)["perplexity"])
    assert found[0] == found[1] == found[2]
    reference = [NAME, "--reference-revision", "right", "--reference-subfolder", "instruct"]
    packed = str(tmp_path / "folder")
    given = ["--reference", *reference, "--cache-dir", str(cache)]
    status, printed, error = run_here(capfd, "evaluate", packed, *measure, *given)
    assert status == 0, error
    assert json.loads(printed)["kl_divergence"] < 0.1
    tune = ["--dataset", text, "--calibration-tokens", "512", "--sequence-length", "32", "--epochs", "1"]
    status, _, error = run_here(capfd, "tune", packed, str(tmp_path / "tuned"), *tune, *given)
    assert status == 0 or "nothing was written; give more text" in error, error
    status, _, error = run_here(capfd, "evaluate", packed, *measure, "--reference-revision", "right")
    assert (status, "--reference-revision belongs to --reference" in error) == (2, True)
    status, _, error = run_here(capfd, "evaluate", packed, *measure, "--revision", "right")
    assert (status, "is a directory; leave it out" in error) == (2, True)


def test_compare_and_optimum_hand_the_options_on(
    nested: Path, cache: Path, text: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods of compare run in other processes, which get the task as JSON."""
    loading = {
        "cache_dir": str(cache),
        "revision": "right",
        "subfolder": "instruct",
        "trust_remote_code": False,
    }
    task = ComparisonTask(
        model=NAME, factor_bits=None, dataset=text, eval=text, batch_size=2, seed=0, max_tokens=512,
        group_size=16, prompt=None, new_tokens=1, loading=loading, **SMALL,
    )  # fmt: skip
    row = run_method("rtn", task, tmp_path)
    direct = evaluate_path(str(nested / "instruct"), text, sequence_length=64, max_tokens=512)
    assert row["perplexity"] == pytest.approx(direct.perplexity, rel=0.5)
    assert run_method("full", task, tmp_path)["perplexity"] == pytest.approx(direct.perplexity, rel=1e-6)
    assert (
        ModelSource.of(NAME, **loading).directory()
        == cache / "models--someone--moe/snapshots" / OTHER / "instruct"
    )

    optimum = pytest.importorskip("bitsmoe_plugin.integrations.optimum")
    quantizer = optimum.BitsMoEQuantizer.from_pretrained(nested, subfolder="instruct")
    quantizer.quantize(tmp_path / "out", dataset=text, basis_bits=8, **SMALL)
    assert read_config(tmp_path / "out").calibration["sha256"] == wanted
    with pytest.raises(ConfigError, match="unknown option revison for a model's files; known: revision"):
        optimum.BitsMoEQuantizer.from_pretrained(nested, revison="right")


def test_the_command_line_takes_conversations(
    model: Path, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Template and arguments for it; a tokenizer without one is refused before anything is calibrated."""
    file, out = tmp_path / "chat.jsonl", tmp_path / "out"
    file.write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": f"{n} " * 99}]}) for n in range(9))
    )
    template = {
        "chat_template": "{% for m in messages %}{{ m.content }}{{ ending }}{% endfor %}",
        "ending": ".",
    }
    for dataset, measured in ((file, text), (text, file)):
        given = ["quantize", str(model), str(out), "--dataset", str(dataset), "--eval", str(measured), *FLAGS]
        status, _, error = run_here(capfd, *given)
        assert (status, "no chat template" in error, "Calibrating" in error) == (2, True, False)
        assert list(tmp_path.iterdir()) == [file]
    for wrong in ("[1]", "{", '{"tokenize": true}'):
        status, _, error = run_here(capfd, *given, "--chat-template-kwargs", wrong)
        assert (status, wrong.split('"')[0] in error, "Traceback" in error) == (2, True, False)
    status, _, error = run_here(capfd, *given, "--chat-template-kwargs", json.dumps(template))
    assert status == 0, error
    assert "chat" not in (out / "config.json").read_text()
    measure = ["evaluate", str(out), "--dataset", str(file), "--json", "--chat-template-kwargs"]
    status, printed, error = run_here(capfd, *measure, json.dumps(template))
    assert status == 0, error
    assert json.loads(printed)["tokens"] > 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subfolder": "none"}, "subfolder='none': .* does not exist"),
        ({"revision": "main"}, "revision='main' is of a model on the hub, but .* is a directory"),
        ({"revision": 3}, "revision is a int; allowed: str or None"),
        ({"trust_remote_code": "yes"}, "trust_remote_code is a str; allowed: bool"),
    ],
)
def test_options_without_meaning_are_refused(nested: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSource.of(nested, **options)


def test_a_token_is_not_printed() -> None:
    assert "secret" not in repr(ModelSource("someone/moe", token="secret"))


@pytest.fixture(scope="module")
def with_code(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a class of its own, beside a tokenizer.json that says something else."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("code") / "letters-model"))
    (folder / "letters.py").write_text(CODE)
    settings = {"tokenizer_class": "LettersTokenizer", "auto_map": AUTO_MAP}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_code_of_a_tokenizer_is_run_only_if_told_so(
    with_code: Path, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers takes another class without a word, and calibrates on other tokens."""
    with pytest.raises(
        UntrustedCodeError, match=r"code of its own along \(LettersTokenizer\).*--trust-remote-code"
    ):
        quantized(with_code, text)
    arguments = ["quantize", str(with_code), str(tmp_path / "out"), "--dataset", text, "--eval", text, *FLAGS]
    status, _, error = run_here(capfd, *arguments)
    assert status == 2
    assert "--trust-remote-code" in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    status, _, error = run_here(capfd, *arguments, "--trust-remote-code")
    assert status == 0, error
    given = AutoTokenizer.from_pretrained(with_code, trust_remote_code=True)
    config = BitsMoEConfig(dataset=text, basis_bits=8, tokenizer=given, **SMALL)
    loaded = AutoModelForCausalLM.from_pretrained(with_code, quantization_config=config)
    assert read_config(tmp_path / "out").calibration["sha256"] == calibrated_on(loaded)
    assert (tmp_path / "out" / "letters.py").read_text() == CODE
    with pytest.raises(UntrustedCodeError):
        load_tokenizer(tmp_path / "out")
    assert load_tokenizer(ModelSource.of(tmp_path / "out", trust_remote_code=True))("ab").input_ids == [
        97,
        98,
    ]


@pytest.mark.parametrize(
    ("name", "model_type"), [("Qwen2TokenizerFast", None), ("MiniMaxTokenizer", "minimax_m2")]
)
def test_code_that_transformers_has_replaced_needs_no_flag(
    with_code: Path, tmp_path: Path, name: str, model_type: str | None
) -> None:
    """Repositories keep naming code whose class, or whose model's tokenizer, is in transformers by now."""
    folder = Path(shutil.copytree(with_code, tmp_path / "model"))
    settings = {"eos_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": [None, f"letters.{name}"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    assert len(load_tokenizer(folder)) > 1000


def test_token_ids_need_no_tokenizer_but_say_so(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "bare"))
    (folder / "tokenizer.json").unlink()
    ids = [torch.randint(0, 4096, (600,))]
    with pytest.warns(UserWarning, match="no tokenizer: .*joined without an end-of-text token"):
        quantized(folder, ids)
    with pytest.raises(ConfigError, match="tokenizer='no/such': none is found there"):
        quantize_to_directory(str(model), tmp_path / "out", BitsMoEConfig(dataset=ids, tokenizer="no/such"))
    with pytest.raises(ConfigError, match="tokenizer=3 is not allowed; allowed: a name"):
        quantize_to_directory(str(model), tmp_path / "out", BitsMoEConfig(dataset=ids, tokenizer=3))
    config = BitsMoEConfig(dataset=ids, tokenizer="no/such", **SMALL)
    with pytest.raises(ConfigError, match="tokenizer='no/such': none is found there"):
        AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
