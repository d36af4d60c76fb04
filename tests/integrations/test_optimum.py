"""optimum's quantizer and ``optimum-cli bitsmoe``: the same command line and the same bytes as ours."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from wheel_support import run_python

from bitsmoe_plugin import BitsMoEConfig, ConfigError, QuantizationError
from bitsmoe_plugin.cli import build_parser
from bitsmoe_plugin.commands import times
from bitsmoe_plugin.integrations.optimum import BitsMoEQuantizer
from bitsmoe_plugin.integrations.transformers import quantize_to_directory

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "moe-tiny")
OPTIONS = {
    "bits": 5.0,
    "dataset": str(EXAMPLES / "data" / "calibration.jsonl"),
    "calibration_tokens": 1024,
    "sequence_length": 128,
    "method": "paper-v2",
}


def optimum_cli(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The program ``optimum-cli`` with the installed wheel."""
    code = "from optimum.commands.optimum_cli import main; main()"
    return run_python(installed, "-c", code, *arguments, cwd=cwd)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def reference(small_moe_tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("optimum") / "reference"
    quantize_to_directory(str(small_moe_tiny), out, BitsMoEConfig(**OPTIONS))
    return out


def test_the_quantizer_writes_the_same_bytes(small_moe_tiny, reference, tmp_path) -> None:
    quantizer = BitsMoEQuantizer.from_pretrained(small_moe_tiny)
    quantizer.quantize(tmp_path / "options", **OPTIONS)
    quantizer.quantize(tmp_path / "config", quantization_config=BitsMoEConfig(**OPTIONS))
    assert contents(tmp_path / "options") == contents(tmp_path / "config") == contents(reference)


def test_optimum_cli_quantizes_to_the_same_bytes(
    installed_wheel, small_moe_tiny, reference, tmp_path
) -> None:
    flags = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    given = [str(small_moe_tiny), "out", *flags]
    done = optimum_cli(installed_wheel, tmp_path, "bitsmoe", "quantize", *given)
    assert done.returncode == 0, done.stderr
    (tmp_path / "out" / times.FILE).unlink()  # which the command writes besides, and is never the same
    assert contents(tmp_path / "out") == contents(reference)


def test_optimum_cli_inspects_and_estimates(installed_wheel, reference, tmp_path) -> None:
    done = optimum_cli(installed_wheel, tmp_path, "bitsmoe", "inspect", str(reference), "--json")
    assert json.loads(done.stdout)["bits_per_weight"] == pytest.approx(5, abs=0.02)
    done = optimum_cli(installed_wheel, tmp_path, "bitsmoe", "estimate", MODEL, "--bits", "2.5", "--json")
    assert json.loads(done.stdout)["smallest_bits"] < 2.5


def test_optimum_cli_has_all_our_commands_with_their_help(installed_wheel, tmp_path) -> None:
    """The registration may not import what it lists, so the list could fall behind."""
    ours = next(action.choices for action in build_parser()._actions if action.choices)
    register = "optimum/commands/register/register_bitsmoe.py"
    names: dict = {}
    exec((installed_wheel / register).read_text(), names)
    assert names["COMMANDS"] == tuple(ours)
    done = optimum_cli(installed_wheel, tmp_path, "bitsmoe", "compare", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: optimum-cli bitsmoe compare")
    assert all(flag in done.stdout for flag in ("--methods", "--bits", "--dataset", "--eval"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", MODEL], "not a packed BitsMoE checkpoint"),
        (["quantize", MODEL, "out", "--dataset", "none.jsonl"], "none.jsonl does not exist"),
        (["pack"], "invalid choice: 'pack'"),
        ([], "required: COMMAND"),
    ],
)
def test_errors_are_those_of_our_command_line(installed_wheel, tmp_path, arguments, message) -> None:
    done = optimum_cli(installed_wheel, tmp_path, "bitsmoe", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "optimum-cli bitsmoe" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_broken_package_leaves_other_commands_of_optimum_alone(installed_wheel, tmp_path) -> None:
    """optimum loads every registration whatever the command; ours must not fail or be slow."""
    broken = Path(shutil.copytree(installed_wheel, tmp_path / "broken"))
    (broken / "bitsmoe_plugin" / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    done = optimum_cli(broken, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert "bitsmoe" in done.stdout
    code = "import sys, optimum.commands.optimum_cli as cli; cli.load_optimum_namespace_cli_commands()"
    code += "; print({'torch', 'transformers', 'bitsmoe_plugin'} & set(sys.modules))"
    done = run_python(broken, "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_wheel_adds_one_file_to_optimum(installed_wheel) -> None:
    """An ``__init__.py`` in its folders would hide the rest of optimum."""
    files = [path.relative_to(installed_wheel) for path in installed_wheel.rglob("*.py")]
    top = {file.parts[0] for file in files}
    assert top == {"bitsmoe_plugin", "vllm_ext", "optimum"}
    theirs = [file.as_posix() for file in files if file.parts[0] == "optimum"]
    assert theirs == ["optimum/commands/register/register_bitsmoe.py"]


def test_what_optimum_offers_and_we_do_not_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="file_name='onnx' is not allowed"):
        BitsMoEQuantizer.from_pretrained(MODEL, file_name="onnx")
    with pytest.raises(ConfigError, match="Qwen3MoeForCausalLM is no directory"):
        BitsMoEQuantizer.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL))
    quantizer = BitsMoEQuantizer.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match="file_prefix='x' is not allowed"):
        quantizer.quantize(tmp_path, file_prefix="x", **OPTIONS)
    with pytest.raises(ConfigError, match=r"not both \(bits\)"):
        quantizer.quantize(tmp_path, quantization_config=BitsMoEConfig(**OPTIONS), bits=3.0)
    (tmp_path / "mine").touch()
    with pytest.raises(QuantizationError, match="not empty"):
        quantizer.quantize(tmp_path, **OPTIONS)
