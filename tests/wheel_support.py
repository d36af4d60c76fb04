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


def build_sdist(source: Path, directory: Path) -> Path:
    """Build a source distribution of a tree as every frontend does: by the hook of its build backend."""
    program = "import build_backend, sys; print(build_backend.build_sdist(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(source / ".ci")}
    command = [sys.executable, "-c", program, str(directory)]
    built = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return directory / built.stdout.split()[-1]
