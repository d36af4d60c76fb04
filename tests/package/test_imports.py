"""What importing the package loads: registering with transformers should cost little beyond transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bitsmoe_plugin.integrations.optimum_commands.register_bitsmoe import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = (
    *("highspy", "rich", "matplotlib", "jinja2", "datasets", "triton", "optimum", "vllm", "lm_eval"),
    *(f"bitsmoe_plugin.{room}" for room in ("allocation", "calibration", "commands", "models", "pipeline")),
    *(f"bitsmoe_plugin.{room}" for room in ("rounding", "runtime", "spectral", "cli")),
)


def run(code: str) -> str:
    """What a new process prints that runs ``code``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_registering_loads_no_room_that_it_does_not_need() -> None:
    """Guards the time that ``import bitsmoe_plugin`` takes, in every process that loads any model."""
    code = f"""
import sys
import transformers.quantizers.auto as known
before = set(sys.modules)
import bitsmoe_plugin
print([name for name in {HEAVY} if name in set(sys.modules) - before])
native = sys.modules.get("bitsmoe_plugin.base.native")
print(native.library.cache_info().currsize if native else 0)
assert known.AUTO_QUANTIZATION_CONFIG_MAPPING["bitsmoe"] is bitsmoe_plugin.BitsMoEConfig
assert known.AUTO_QUANTIZER_MAPPING["bitsmoe"] is bitsmoe_plugin.BitsMoEQuantizer
missing = [name for name in bitsmoe_plugin.__all__ if not hasattr(bitsmoe_plugin, name)]
from bitsmoe_plugin import write_model_card
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
print(missing, callable(write_model_card), callable(quantize_to_directory))
"""
    assert run(code).splitlines() == ["[]", "0", "[] True True"]


ANSWERED_AT_ONCE = (
    ["--version"],
    ["--help"],
    *([command, "--help"] for command in COMMANDS),
    *(["bench", name, "--help"] for name in ("layer", "decode", "quantize", "allocation", "checkpoint")),
)


def test_help_and_version_need_no_library() -> None:
    """Guards the time that they take, and help where transformers or torch cannot be imported."""
    code = f"""
import contextlib, io, sys
for name in ("torch", "transformers", "numpy", "safetensors", "rich", "highspy"):
    sys.modules[name] = None
from vllm_ext.command import main
for arguments in {ANSWERED_AT_ONCE}:
    sys.argv = ["bitsmoe", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main()
    except SystemExit as end:
        print(end.code, "bitsmoe" in out.getvalue())
    for name in [name for name in sys.modules if name.startswith("bitsmoe_plugin")]:
        del sys.modules[name]
sys.argv = ["bitsmoe", "inspect", "nowhere"]
print(main())
"""
    assert run(code).splitlines() == ["0 True"] * len(ANSWERED_AT_ONCE) + ["2"]


def test_the_package_as_a_program_answers_as_soon(packed_moe_tiny: Path, tmp_path: Path) -> None:
    """``python -m bitsmoe_plugin``: as above, without what cannot be imported here, and with it for commands.
    An error then is one line."""
    broken = tmp_path / "transformers.py"
    broken.write_text("raise ImportError('transformers is broken')")
    for arguments, where, status in (
        (["--version"], tmp_path, 0),
        (["quantize", "--help"], tmp_path, 0),
        (["inspect", str(packed_moe_tiny)], tmp_path, 2),
        (["inspect", str(packed_moe_tiny), "--json"], None, 0),
    ):
        paths = [str(path) for path in (where, ROOT, os.environ.get("PYTHONPATH")) if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "BITSMOE_DISABLE_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "bitsmoe_plugin", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert ("transformers is broken" in done.stderr) == (status == 2)


def test_only_the_program_itself_leaves_the_registration_out(tmp_path: Path) -> None:
    """Guards ``python -m`` of other modules that import the package, ours and others'."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import bitsmoe_plugin\n")
    (tmp_path / "other" / "__main__.py").write_text(
        "import bitsmoe_plugin as b; print(b.BitsMoEConfig.__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "other", "bitsmoe_plugin"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "BitsMoEConfig", done.stderr


def test_help_in_optimum_is_as_quick() -> None:
    """Guards commands of optimum-cli against two seconds before they say how they are called."""
    file = ROOT / "bitsmoe_plugin/integrations/optimum_commands/register_bitsmoe.py"
    code = f"""
import argparse, importlib.util, sys
spec = importlib.util.spec_from_file_location("register", {str(file)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    given = argparse.Namespace(arguments=["quantize", "--help"])
    parsers = argparse.ArgumentParser().add_subparsers()
    module.BitsMoECommand(parsers, args=given).run()
except SystemExit as end:
    print(end.code, [name for name in ("torch", "transformers") if name in sys.modules])
"""
    *help_text, last = run(code).splitlines()
    assert help_text[0].startswith("usage: optimum-cli bitsmoe quantize")
    assert last == "0 []"


def test_the_program_registers_before_a_command_runs(packed_moe_tiny: Path) -> None:
    """Guards commands that find the package half imported: it is, while arguments are parsed."""
    code = f"""
import sys
from vllm_ext.command import main
sys.argv = ["bitsmoe", "inspect", {str(packed_moe_tiny)!r}, "--json"]
status = main()
import bitsmoe_plugin
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
print(status, known["bitsmoe"] is bitsmoe_plugin.BitsMoEQuantizer, bitsmoe_plugin.cli.run.__module__)
"""
    assert run(code).splitlines()[-1] == "0 True bitsmoe_plugin.cli"
