"""Python with the installed wheel, as users have it: without the editable installation of the tests."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(installed: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run an interpreter that finds our package in ``installed`` alone.

    ``-S`` leaves out .pth files, and with them the editable installation, whose part of optimum's
    namespace would be found next to that of the wheel.

    Args:
        installed: from the fixture ``installed_wheel``.
        variables: environment variables to set.
    """
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BITSMOE_")}
    environment.update(PYTHONPATH=os.pathsep.join([str(installed), *packages]), **variables)
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
