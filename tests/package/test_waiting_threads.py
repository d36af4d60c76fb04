"""How threads wait for each other while a model is quantized."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
