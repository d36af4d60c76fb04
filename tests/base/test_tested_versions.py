"""Tested versions: one table, the requirements that follow from it, and what is said about others."""

import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from vllm_support import needs_vllm

from bitsmoe_plugin import VersionError
from bitsmoe_plugin.base import tested_versions

ROOT = Path(__file__).parents[2]


def pretend(monkeypatch, **versions: str) -> None:
    """Other versions of distributions than those that are installed."""
    monkeypatch.setattr(tested_versions, "version", lambda name: versions.get(name) or version(name))


@pytest.mark.parametrize("name", tested_versions.TESTED)
def test_requirements_follow_from_the_table(name) -> None:
    """pip would install what is refused on import, or refuse what is tested."""
    stated = [Requirement(text) for text in re.findall(r'"(.*?)"', (ROOT / "pyproject.toml").read_text())
              if re.match(rf"{name}[<>=]", text)]  # fmt: skip
    assert [Requirement(name + tested_versions.TESTED[name].requirement)] == stated


@pytest.mark.parametrize("name", tested_versions.TESTED)
def test_the_readme_states_the_same(name) -> None:
    (row,) = re.findall(rf"^\| {name} \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE | re.I)
    oldest, newest, without_gpu = (cell.strip() for cell in row.split("|")[:3])
    tested = tested_versions.TESTED[name]
    assert (oldest, newest, without_gpu) == (tested.oldest, tested.newest, tested.without_gpu or "")


@pytest.mark.parametrize("name", tested_versions.TESTED)
def test_the_environment_is_at_the_end_of_the_range_that_it_is_meant_to_test(name) -> None:
    """CI's environments move on with the package index, or stay behind it: then the table claims too much."""
    end = os.environ.get("BITSMOE_EXPECT_VERSIONS")
    if end is None:
        pytest.skip("set by CI")
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not in this environment")
    wanted = getattr(tested_versions.TESTED[name], end)
    if wanted is None:
        pytest.skip(f"{name} has no release that is tested {end}")
    assert Version(installed).release[:2] == Version(wanted).release


@pytest.mark.parametrize("installed", ["5.18.0", "4.57.1", "5.18.0rc1"])
def test_an_older_release_is_an_error_with_the_remedy(monkeypatch, installed) -> None:
    pretend(monkeypatch, transformers=installed)
    with pytest.raises(VersionError) as caught:
        tested_versions.check_versions("torch", "transformers")
    assert isinstance(caught.value, ImportError)
    for text in (installed, "5.19 or newer", 'pip install "transformers>=5.19,<6"'):
        assert text in str(caught.value)


def test_a_newer_release_is_a_warning(monkeypatch) -> None:
    pretend(monkeypatch, transformers="5.99.0.dev0")
    with pytest.warns(
        UserWarning, match=r"transformers 5\.99\.0\.dev0 is newer .* \(5\.19 to 5\.\d+\)"
    ) as seen:
        tested_versions.check_versions("torch", "transformers")
    assert len(seen) == 1


@pytest.mark.parametrize("installed", ["2.13.0+cpu", "2.13.1", "2.13.0a0+git1234", "2.14.0+cu130", "2.15.0"])
def test_builds_and_patches_of_a_tested_release_are_tested(monkeypatch, installed) -> None:
    """Wheels of torch for CUDA or CPU differ in a suffix; a warning for each would be noise."""
    pretend(monkeypatch, torch=installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tested_versions.check_versions("torch")


OLD_TRANSFORMERS = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: "4.57.1" if name == "transformers" else real(name)
"""


def test_the_package_says_so_before_anything_else_fails() -> None:
    """An older transformers lacks modules that the package imports: that error would come first."""
    code = OLD_TRANSFORMERS + "import sys; sys.modules['transformers'] = None\nimport bitsmoe_plugin"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "needs transformers 5.19 or newer" in done.stderr.splitlines()[-1]


@needs_vllm
def test_an_older_vllm_is_logged_and_serves_other_models(monkeypatch, caplog) -> None:
    """Its plugin loader passes exceptions on, in every process of every server of the environment."""
    import logging

    from vllm.model_executor.layers import quantization

    import vllm_ext

    pretend(monkeypatch, vllm="0.30.1")
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", [])
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # caplog listens at the root
    vllm_ext.register()
    assert quantization.QUANTIZATION_METHODS == []
    assert "cannot be served" in caplog.text
    assert "needs vllm 0.32 or newer" in caplog.text
