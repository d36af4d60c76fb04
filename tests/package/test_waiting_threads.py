"""How threads wait for each other while a model is quantized."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from bitsmoe_plugin.commands.compare import method as method_process
from bitsmoe_plugin.commands.compare.task import ComparisonTask

PROGRAM = """
import os, sys
from importlib import import_module
main = import_module(sys.argv.pop(1)).main
try:
    main()
except SystemExit:
    pass
print(os.environ.get("OMP_WAIT_POLICY"))
"""

TASK = ComparisonTask(
    model=".", bits=2.0, factor_bits=None, dataset="c", eval="e", calibration_tokens=4096,
    sequence_length=128, batch_size=8, seed=0, max_tokens=None, group_size=64, prompt=None, new_tokens=40,
)  # fmt: skip


@pytest.mark.parametrize("program", ["vllm_ext.command", "bitsmoe_plugin.__main__"])
@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_do_not_spin_while_quantizing(program: str, given: str | None, wanted: str) -> None:
    """On a crowded machine spinning threads took more than three times as long; what the user set stays."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    call = [sys.executable, "-c", PROGRAM, program, "quantize", "--help"]
    found = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split()[-1] == wanted


@pytest.mark.parametrize(("method", "wanted"), [("bitsmoe", "PASSIVE"), ("gptq", None)])
def test_those_of_a_comparison_do_not_either(method: str, wanted: str | None, monkeypatch) -> None:
    """Peers wait as they do wherever people run them: some are slower so on an idle machine."""
    seen = {}

    def run(command: list[str], *, env: dict[str, str] | None, **options: Any) -> subprocess.CompletedProcess:
        seen.update(os.environ if env is None else env)
        return subprocess.CompletedProcess(command, 0, stdout="{}")

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(method_process.subprocess, "run", run)
    method_process.in_process(method, TASK, debug=False)
    assert seen.get("OMP_WAIT_POLICY") == wanted
