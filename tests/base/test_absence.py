"""Why the compiled library is not there, told from where the package was found."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from bitsmoe_plugin.base.native import absence, library_in


def package(folder: Path, *files: str) -> Path:
    """A folder like the package's, with these files in ``base/native``."""
    native = folder / "bitsmoe_plugin" / "base" / "native"
    native.mkdir(parents=True)
    for name in files:
        (native / name).write_bytes(b"no library")
    return folder / "bitsmoe_plugin"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other copy of the package can be found."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(absence, "distribution", absence_of_distribution)


def absence_of_distribution(name: str) -> None:
    raise absence.PackageNotFoundError(name)


@pytest.mark.usefixtures("alone")
def test_what_is_wrong_is_said_with_the_place(tmp_path: Path) -> None:
    """One remedy does not fit all: a compiler helps where nothing was compiled only."""
    cases = {
        "none": ((), "installed without a C compiler: its kernels were not compiled; install a C compiler"),
        "broken": ((f"_cpu{EXTENSION_SUFFIXES[0]}",), "cannot be loaded"),
        "other": (("_cpu.cpython-27m-x86_64-linux-gnu.so",), "which is not for Python"),
    }
    for name, (files, wanted) in cases.items():
        place = package(tmp_path / name, *files)
        text = absence.reason(place)
        assert wanted in text
        assert f"found at {place}" in text
    source = package(tmp_path / "source")
    (source / "base" / "native" / "csrc").mkdir()
    assert "a source tree: its kernels were not compiled" in absence.reason(source)


@pytest.mark.usefixtures("alone")
def test_a_source_tree_that_hides_the_installed_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: started from a second checkout, 20 times slower, with one warning among progress bars."""
    hidden = package(tmp_path / "site", f"_cpu{EXTENSION_SUFFIXES[0]}")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert library_in(hidden / "base" / "native")
    assert f"hides the one at {hidden}" in absence.reason(package(tmp_path / "checkout"))
