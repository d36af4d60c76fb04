"""What is released: the files that it should hold and no others, the same bytes whenever it is built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheel_support import build_sdist

ROOT = Path(__file__).parents[2]
PACKAGES = ("bitsmoe_plugin", "vllm_ext")
REGISTRATION = "optimum/commands/register/register_bitsmoe.py"
DATA = {f"bitsmoe_plugin/commands/report/templates/report.{kind}" for kind in ("css", "html")}
TASKS = ("SOURCES.md", "last_word.jsonl", "last_word.yaml")
DATA |= {f"bitsmoe_plugin/commands/bundled_tasks/{name}" for name in TASKS}
EXTRAS = ("dev", "report", "optimum", "lm-eval", "peft", "dense")
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def sources() -> set[str]:
    """Python files of the packages, by their paths in the tree."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_holds_the_packages_and_nothing_else(installed_wheel: Path) -> None:
    """Guards against tests, data and top-level names that would be installed next to everyone else's."""
    (path,) = installed_wheel.parent.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert {name.partition(".dist-info/")[2] for name in metadata} == METADATA
    compiled = {n for n in names if re.fullmatch(r"bitsmoe_plugin/base/native/_cpu\.[\w.-]+", n)}
    assert len(compiled) == 1
    moved = {name for name in sources() if "/optimum_commands/" in name}
    assert len(moved) == 1
    assert names - metadata - compiled == (sources() - moved) | {REGISTRATION} | DATA


def test_the_source_distribution_holds_what_building_needs(installed_wheel: Path) -> None:
    """The wheel above was built from it. Guards against tests without their data, and the examples' data."""
    (path,) = installed_wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    others = {name for name in names if not name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    assert others == {".ci/build_backend.py", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "bitsmoe_plugin/base/native/csrc").iterdir()}
    assert names - others == sources() | code | DATA


def test_source_distributions_are_the_same_bytes(installed_wheel: Path, tmp_path: Path) -> None:
    """Guards against names, times and order of the file system in them."""
    source = installed_wheel.parent / "source"
    for path in source.rglob("*.py"):
        os.utime(path, (1e9, 1e9))
    (first,) = installed_wheel.parent.glob("*.tar.gz")
    assert build_sdist(source, tmp_path).read_bytes() == first.read_bytes()


@pytest.mark.exhaustive
def test_wheels_are_the_same_bytes(installed_wheel: Path, tmp_path: Path) -> None:
    """Guards against paths and times in what the compiler and the archiver write."""
    (sdist,) = installed_wheel.parent.glob("*.tar.gz")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=True, cwd=tmp_path)
    (first,), (second,) = installed_wheel.parent.glob("*.whl"), tmp_path.glob("*.whl")
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("file", "extras"), [("constraints.txt", EXTRAS), ("constraints-vllm.txt", ("dev",))]
)
def test_pinned_versions_are_in_the_required_ranges(
    file: str, extras: tuple[str, ...], installed_wheel: Path
) -> None:
    """Guards CI against pins that a change of pyproject.toml has overtaken: pip would find no solution."""
    lines = (ROOT / ".ci" / file).read_text(encoding="utf-8").splitlines()[1:]
    pins = [Requirement(line) for line in lines]
    assert all([part.operator for part in pin.specifier] == ["=="] and pin.url is None for pin in pins)
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert not {"torch", "triton"} & versions.keys(), "the Makefile's TORCH is to decide"
    (package,) = distributions(path=[str(installed_wheel)])
    for text in package.requires or ():
        wanted = Requirement(text)
        needed = wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras)
        if needed and wanted.name != "torch":
            assert versions[canonicalize_name(wanted.name)] in wanted.specifier, text
