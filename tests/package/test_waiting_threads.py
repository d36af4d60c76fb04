"""How threads wait for each other while a model is quantized."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from vllm_ext.command import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_do_not_spin_while_quantizing(given: str | None, wanted: str) -> None:
    """On a crowded machine spinning threads took more than three times as long; what the user set stays."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    call = [sys.executable, "-c", PROGRAM, "quantize", "--help"]
    found = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split()[-1] == wanted
