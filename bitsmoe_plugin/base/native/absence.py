"""Why the compiled library cannot be used: where the package was found, and what is wrong there."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from bitsmoe_plugin.base.native import library_in

PACKAGE = Path(__file__).resolve().parents[2]
_NATIVE = Path("base", "native")


def reason(package: Path = PACKAGE) -> str:
    """Where the package is, why its library cannot be loaded, and what to do; one line.

    Args:
        package: its folder.
    """
    found, folder = f"bitsmoe_plugin was found at {package}", package / _NATIVE
    path = library_in(folder)
    if path is not None:
        return f"{found}, and its {path.name} cannot be loaded ({_error_of(path)}); install the package again"
    other = _elsewhere(package)
    if other is not None:
        return (
            f"{found}, where nothing is compiled, and hides the one at {other}, where the kernels are; "
            "start from another directory, or without this one in PYTHONPATH"
        )
    built = sorted(file.name for file in folder.glob("_cpu.*") if file.suffix in (".so", ".pyd"))
    if built:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor} on this machine"
        return f"{found}, with {built[0]}, which is not for {python}; install the package again with this one"
    where = "a source tree" if (folder / "csrc").is_dir() else "installed without a C compiler"
    remedy = "install a C compiler (gcc or clang) and reinstall the package with pip"
    return f"{found}, {where}: its kernels were not compiled; {remedy}"


def _error_of(path: Path) -> str:
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return " ".join(str(error).split())
    return "it can by now"


def _elsewhere(package: Path) -> Path | None:
    """Another copy of the package that has its library, and that this process would find without this one."""
    copies = (folder / package.name for folder in _places())
    return next((copy for copy in copies if copy != package and library_in(copy / _NATIVE)), None)


def _places() -> Iterator[Path]:
    yield from (Path(entry).resolve() for entry in sys.path)
    try:
        installed = distribution("bitsmoe-plugin")
    except PackageNotFoundError:
        return
    origin = installed.read_text("direct_url.json")  # of an editable installation
    if origin is not None:
        yield Path(unquote(urlparse(json.loads(origin).get("url", "")).path)).resolve()
