"""Python with the installed wheel, as users have it: without the editable installation of the tests."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
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


def fresh_environment(installed: Path, directory: Path) -> Path:
    """A virtual environment with the wheel installed by pip, and all other packages of this one in reach.

    Args:
        installed: from the fixture ``installed_wheel``.

    Returns:
        its site-packages, before which nothing is found; programs are in ``directory / "bin"``.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    (wheel,) = installed.parent.glob("*.whl")
    python = str(directory / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    # As plain paths, behind its own: their .pth files are not read, so neither is the editable installation.
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    return site


def run_program(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``bin/bitsmoe`` of such an environment, without variables of this one."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("BITSMOE_", "PYTHON"))
    }
    command = [str(directory / "bin" / "bitsmoe"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=directory, env=environment
    )


def build_sdist(source: Path, directory: Path) -> Path:
    """Build a source distribution of a tree as every frontend does: by the hook of its build backend."""
    program = "import build_backend, sys; print(build_backend.build_sdist(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(source / ".ci")}
    command = [sys.executable, "-c", program, str(directory)]
    built = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return directory / built.stdout.split()[-1]


def install_wheel(root: Path, cache: Path, directory: Path) -> None:
    """Build a source distribution of a tree, a wheel of that, and install it.

    Compiling takes a minute, so wheels stay for later runs of the tests, by all that they are made of.

    Args:
        root: of the repository.
        cache: of wheels.
        directory: gets both distributions, ``source`` and ``installed``.
    """
    source = directory / "source"  # a copy, because files left in build/ would get into the wheel
    # All folders, so that one that should not be packaged would be noticed.
    unwanted = (".git", ".*env*", ".*cache", ".hypothesis", "build", "dist", "out", "logs", "__pycache__")
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(*unwanted, "*.egg-info", "*.so"))
    sdist = build_sdist(source, directory)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made_of = f"{sys.version} {os.uname()} {version('setuptools')}".encode()
    known = cache / hashlib.sha256(sdist.read_bytes() + made_of).hexdigest()[:16]
    if not known.exists():
        build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*build, "--wheel-dir", str(directory), str(sdist)], check=True)
        _keep(known, directory)
    for wheel in known.glob("*.whl"):
        shutil.copy(wheel, directory)
    (wheel,) = directory.glob("*.whl")
    target = str(directory / "installed")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", target, str(wheel)]
    subprocess.run(install, check=True)


def _keep(known: Path, built: Path) -> None:
    """Keep a wheel, if compiling succeeded, and of those that were kept before the last few."""
    (wheel,) = built.glob("*.whl")
    if not any("/_cpu." in name for name in zipfile.ZipFile(wheel).namelist()):
        return
    partial = known.with_name(f"{known.name}.{os.getpid()}")
    partial.mkdir()
    shutil.copy(wheel, partial)
    partial.rename(known)
    for old in sorted(known.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-4]:
        shutil.rmtree(old)
