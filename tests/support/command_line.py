"""Commands run in the process of the tests: what a process prints, without the seconds of its imports."""

from __future__ import annotations

import pytest

from bitsmoe_plugin.cli import main


def run_here(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``bitsmoe`` with these arguments."""
    capfd.readouterr()
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    return status, *capfd.readouterr()
