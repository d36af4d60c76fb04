"""Which releases of other packages this one is tested with, and what an installed one outside of them means.

Stated here alone: pyproject.toml's requirements and the table in README.md are compared with it by a test.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from bitsmoe_plugin.errors import VersionError
from bitsmoe_plugin.version import __version__


@dataclass(frozen=True)
class VersionRange:
    """Releases as major.minor; patch releases count as tested.

    Attributes:
        oldest: the whole test suite that needs the package passes with it; older ones are refused.
        newest: likewise; newer ones may work and give a warning.
        below: first release that pip may not choose; None: any.
        without_gpu: a newer one whose builds are for CUDA alone, of which `make test-newest` runs what needs
            no GPU: no kernel of it was ever launched. Gives no warning either.
    """

    oldest: str
    newest: str
    below: str | None
    without_gpu: str | None = None

    @property
    def requirement(self) -> str:
        """What pyproject.toml asks for."""
        return f">={self.oldest}" + (f",<{self.below}" if self.below else "")

    def __str__(self) -> str:
        whole = self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"
        return f"{whole}; {self.without_gpu} without a GPU" if self.without_gpu else whole


TESTED = {
    # The only release with a build for CPUs at hand. 2.14, which vLLM 0.33 asks for, is run like 2.15.
    "torch": VersionRange("2.13", "2.13", None, without_gpu="2.15"),
    # 5.19 is the only release that vLLM 0.32 (below 5.20) and we both take, so it is what vLLM's tests run;
    # beside vLLM 0.33 it is 5.20.
    "transformers": VersionRange("5.19", "5.24", "6"),
    "optimum": VersionRange("2.0", "2.3", "3"),
    "vllm": VersionRange("0.32", "0.32", "0.34", without_gpu="0.33"),
}
"""Name of a distribution -> what is tested."""


def check_versions(*names: str) -> None:
    """Compare what is installed with ``TESTED``, from package metadata alone: nothing is imported.

    A distribution that is not found is left to the import that follows, which says so itself.

    Raises:
        VersionError: an installed release is older than the oldest tested. Older ones lack interfaces that
            are used here, and would fail somewhere in the middle with an error that names none of this.

    Warns:
        UserWarning: one is newer than the newest tested. Most of them work.
    """
    for name in names:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        _check(name, installed, TESTED[name])


def _check(name: str, installed: str, tested: VersionRange) -> None:
    release = Version(installed).release[:2]
    if release < Version(tested.oldest).release:
        raise VersionError(
            f"bitsmoe-plugin {__version__} needs {name} {tested.oldest} or newer (tested: {tested}), and "
            f'{installed} is installed; pip install "{name}{tested.requirement}"'
        )
    if release > Version(tested.without_gpu or tested.newest).release:
        warnings.warn(
            f"{name} {installed} is newer than what bitsmoe-plugin {__version__} is tested with ({tested}). "
            f"It may work; if something fails, upgrade bitsmoe-plugin, or "
            f'pip install "{name}=={tested.newest}.*"',
            stacklevel=3,
        )


def check_companions(error: Exception) -> None:
    """Name what is behind an error of importing transformers, which imports torchvision wherever it is.

    Raises:
        VersionError: it is of another build than torch, as beside vLLM for the CPU.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except Exception as reason:
        raise VersionError(
            f"torchvision {version('torchvision')} does not fit torch {version('torch')} ({reason}), and "
            "transformers imports it; pip uninstall torchvision torchaudio torchcodec (models of text do "
            "not need them)"
        ) from error


def describe_versions() -> str:
    """This package's version and those of others, installed and tested, for bug reports."""
    lines = [f"bitsmoe-plugin {__version__}"]
    for name, tested in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "not installed"
        lines.append(f"{name} {installed} (tested: {tested})")
    return "; ".join(lines)
