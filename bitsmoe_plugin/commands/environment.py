"""``bitsmoe env``: what decides how fast this installation is, for bug reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

import torch

from bitsmoe_plugin.base import native, threads
from bitsmoe_plugin.base.native import absence
from bitsmoe_plugin.base.tested_versions import TESTED
from bitsmoe_plugin.version import __version__

_KERNELS = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "plain C"}
_TILES = {
    "amx": "AVX-512 and AMX-INT8",
    "refused": "AVX-512; the CPU has AMX-INT8, but the system refuses its use",
}


def environment() -> dict[str, Any]:
    """JSON-ready.

    Returns:
        ``package``: its folder. ``kernels``: what the compiled code in use was made for (AVX-512, with or
        without AMX-INT8, AVX2, plain C), or "missing: " and why. ``gpu``: name of the first, None without.
        ``threads``: ``usable``, ``affinity``, ``quota`` of the control group (None: none) and ``torch``, how
        many torch starts. ``versions``: of this package and others by name, None where they are not
        installed.
    """
    kernels = native.select(None)
    return {
        "package": str(absence.PACKAGE),
        "kernels": _described(kernels) if kernels else f"missing: {absence.reason()}",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": {
            "usable": threads.usable(),
            "affinity": threads.affinity(),
            "quota": threads.quota(),
            "torch": torch.get_num_threads(),
        },
        "versions": {"bitsmoe-plugin": __version__, **{name: _version(name) for name in TESTED}},
    }


def _described(kernels: str) -> str:
    return _TILES.get(native.select_tiles(None) or "none", _KERNELS[kernels])


def _version(name: str) -> str | None:
    for distribution in (name, f"{name}-cpu"):  # vLLM's build for CPUs
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def print_environment(found: dict[str, Any], stream: TextIO) -> None:
    """One line for each."""
    counts = found["threads"]
    quota = "none" if counts["quota"] is None else f"{counts['quota']:g}"
    text = (
        f"{counts['usable']} usable (affinity {counts['affinity']}, quota {quota}); torch {counts['torch']}"
    )
    lines = {"package": found["package"], "kernels": found["kernels"], "gpu": found["gpu"] or "none"}
    lines |= {"threads": text, **{k: v or "not installed" for k, v in found["versions"].items()}}
    for name, value in lines.items():
        print(f"{name}: {value}", file=stream)
