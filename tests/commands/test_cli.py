"""The command line as users and scripts call it: exit codes, JSON alone on stdout; in processes of their own,
whose imports take seconds, where a model is computed with or another package prints."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import run_here

from bitsmoe_plugin.commands.compare import METHODS
from bitsmoe_plugin.commands.compare.runners import RUNNERS

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "moe-tiny")
CALIBRATION = str(EXAMPLES / "data" / "calibration.jsonl")
EVAL = str(EXAMPLES / "data" / "eval.jsonl")
FAST = ["--calibration-tokens", "4096", "--sequence-length", "128"]
FEW = ["--calibration-tokens", "2048", "--sequence-length", "128", "--max-tokens", "3000"]


def bitsmoe(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bitsmoe_plugin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "packed"
    text = tmp_path_factory.mktemp("text") / "few.jsonl"
    text.write_text("\n".join(Path(EVAL).read_text().splitlines()[:12]))
    data = ("--dataset", CALIBRATION, "--eval", str(text))
    done = bitsmoe("quantize", MODEL, str(out), "--bits", "2.5", *data, *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Rounding layers" in done.stderr
    return out


def test_quantize_writes_a_complete_checkpoint(packed) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in packed.iterdir()}
    assert [p.name for p in packed.parent.iterdir()] == ["packed"]


def test_quantize_tells_the_card_what_it_measured(packed) -> None:
    card = (packed / "README.md").read_text()
    assert "Perplexity on few.jsonl" in card
    assert "Calibration: calibration.jsonl, 3,840 tokens" in card


def test_inspect_json(packed, capfd) -> None:
    report = json.loads(run_here(capfd, "inspect", str(packed), "--json")[1])
    assert 2.49 < report["bits_per_weight"] <= 2.5
    for layer in report["layers"].values():
        for histogram in layer["widths"].values():
            assert sum(histogram.values()) == 48 * 128


def test_inspect_table_names_every_projection(packed, capfd) -> None:
    _, out, _ = run_here(capfd, "inspect", str(packed))
    assert all(word in out for word in ("gate", "up", "down", "bits per expert weight"))


def test_evaluate_json(packed) -> None:
    done = bitsmoe("evaluate", str(packed), "--dataset", EVAL, "--max-tokens", "6000", "--json", "--card")
    result = json.loads(done.stdout)
    assert f"**{result['perplexity']:.3f}**" in (packed / "README.md").read_text()
    assert {"perplexity", "tokens", "per_domain"} <= result.keys()
    assert 40 < result["perplexity"] < 80
    assert {"fiction", "techdoc"} <= result["per_domain"].keys()


def test_compare_json() -> None:
    done = bitsmoe(
        "compare", MODEL, "--bits", "2", "--dataset", CALIBRATION, "--eval", EVAL, "--json",
        "--methods", "full,rtn,bitsmoe", *FEW,
    )  # fmt: skip
    rows = {row["method"]: row for row in json.loads(done.stdout)["results"]}
    keys = {"bits_per_weight", "expert_bytes", "perplexity", "kl_divergence", "top1_agreement"}
    assert all(keys | {"quantize_seconds"} <= row.keys() for row in rows.values())
    assert rows["full"]["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert rows["full"]["bits_per_weight"] == 16
    assert rows["full"]["perplexity"] < rows["bitsmoe"]["perplexity"] < rows["rtn"]["perplexity"]
    assert rows["bitsmoe"]["bits_per_weight"] <= 2.0 < rows["rtn"]["bits_per_weight"]


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="make install-gptq")
def test_compare_with_gptq() -> None:
    """gptqmodel quantizes, our reader evaluates; a wrong reading of its format ruins the perplexity."""
    done = bitsmoe(
        "compare", MODEL, "--bits", "4", "--dataset", CALIBRATION, "--eval", EVAL, "--json",
        "--methods", "full,gptq", *FEW,
    )  # fmt: skip
    rows = {row["method"]: row for row in json.loads(done.stdout)["results"]}
    assert rows["gptq"]["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 64, rel=1e-6)
    assert rows["gptq"]["perplexity"] < 1.05 * rows["full"]["perplexity"]
    assert 0.001 < rows["gptq"]["kl_divergence"] < 0.05


def test_estimate_agrees_with_what_was_stored(packed, capfd) -> None:
    """The dry run, as a script calls it, against the real thing at the same bits."""
    status, out, errors = run_here(capfd, "estimate", MODEL, "--bits", "2.5", "--json")
    assert status == 0, errors
    result = json.loads(out)
    assert {"parts", "memory", "peak_memory_bytes", "smallest_bits", "seconds"} <= result.keys()
    size = (packed / "model.safetensors").stat().st_size
    assert result["checkpoint_bytes"] == pytest.approx(size, rel=0.02)


def test_estimate_table_names_the_parts(capfd) -> None:
    _, out, errors = run_here(capfd, "estimate", MODEL, "--factor-bits", "2", "--option", "basis_bits=8")
    words = ("payload", "bases", "packed checkpoint", "peak memory", "smallest reachable", "time on this")
    assert all(word in out for word in words), errors


def test_bench_quantize_times_what_is_run(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards parts that are renamed or no longer called: each of the default method must have taken time,
    together no more than the whole."""
    size = ("--shape", "moe-tiny", "--experts", "4", "--tokens", "256", "--bits", "4", "--gptq-experts", "0")
    status, out, _ = run_here(capfd, "bench", "quantize", *size, "--json")
    assert status == 0
    whole, *parts = json.loads(out)
    assert all(part["seconds"] > 0 for part in parts), parts
    nested = ("factors", "feedback", "allocation")  # in the time of others
    own = [part["seconds"] for part in parts if not part["part"].strip().startswith(nested)]
    assert sum(own) < whole["seconds"]


def test_bench_allocation_json(capfd) -> None:
    """Keys and meaning at a small size: a budget for all layers is never worse than one for each."""
    size = ["--layers", "3", "--experts", "4", "--rank", "64", "--intermediate-size", "64"]
    status, out, errors = run_here(capfd, "bench", "allocation", *size, "--json")
    assert status == 0, errors
    row = json.loads(out)
    assert row["units"] == 3 * 4 * 3 * 64
    assert row["relative_gap"] <= 1e-6
    assert row["lower_bound"] <= row["objective"] <= row["per_layer_objective"]
    assert row["per_layer_over_global"] == pytest.approx(row["per_layer_objective"] / row["objective"])
    assert {"seconds", "per_layer_seconds", "peak_rss_bytes", "dual_relative_gap", "core_units"} <= row.keys()


def test_every_method_that_help_names_can_be_run() -> None:
    assert tuple(RUNNERS) == METHODS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", MODEL, "OUT", "--dataset", "none.jsonl"], "none.jsonl does not exist"),
        (["quantize", MODEL, "OUT", "--dataset", CALIBRATION, "--bits", "99"], "bits=99.0 is not allowed"),
        (["quantize", MODEL, "OUT", "--dataset", CALIBRATION, "--option", "widths=[2,5]"], "widths=(2, 5)"),
        (["estimate", MODEL, "--option", "bits=3"], "use --bits"),
        (["quantize", "no/such/model", "OUT", "--dataset", CALIBRATION], "no/such/model"),
        (["estimate", "no/such/model"], "no/such/model"),
        (["estimate", MODEL, "--bits", "0.2"], "smallest reachable is 0.2604"),
        (["bench", "allocation", "--layers", "0"], "--layers: '0' is no whole number"),
        (["inspect", MODEL], "not a packed BitsMoE checkpoint"),
        (["evaluate", MODEL, "--dataset", EVAL, "--card"], "not a packed BitsMoE checkpoint"),
        (["evaluate", "./no/model", "--dataset", EVAL], "model directory ./no/model does not exist"),
        (["compare", MODEL, "--dataset", CALIBRATION, "--eval", EVAL, "--methods", "awq"], "'awq'"),
        (["compare", MODEL, "--dataset", CALIBRATION, "--eval", "none.txt"], "none.txt does not exist"),
    ],
)
def test_bad_arguments_give_one_error_line(arguments, message, tmp_path, capfd) -> None:
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    status, stdout, stderr = run_here(capfd, *arguments)
    assert status == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_with_the_status_of_its_error() -> None:
    done = bitsmoe("inspect", MODEL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("bitsmoe: error: ")
