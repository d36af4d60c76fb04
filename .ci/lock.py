"""Write what CI installs: constraints for pip, and a table with the licence of each package.

    python .ci/lock.py CONSTRAINTS TABLE REQUIREMENT ...      (make lock)

Run with the interpreter of an environment; the requirements are what it was made for. All that they need is
looked up among what is installed, and nothing else that lies there is taken along. torch, and what comes and
goes with its builds, is left to the variable TORCH of the Makefile. Rows of the table that belong to another
environment stay, so remove the rows to start afresh.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "bitsmoe-plugin"
_SPELLINGS = {
    r"Apache Software License|Apache 2\.0( License)?": "Apache-2.0",
    r"(The )?MIT License( \(MIT\))?": "MIT",
    r"3-Clause BSD License": "BSD-3-Clause",
    r"BSD License|BSD-derived.*": "BSD",
    r"Mozilla Public License 2\.0 \(MPL 2\.0\)": "MPL-2.0",
    r"Python Software Foundation License": "PSF-2.0",
    r"ISC License \(ISCL\)": "ISC",
    r"The Unlicense \(Unlicense\)": "Unlicense",
    r"GNU Lesser General Public License v2 or later \(LGPLv2\+\)": "LGPL-2.0-or-later",
}
_WITH_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*|vllm$")


def needed(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Name -> distribution of all that the requirements need here."""
    found: dict[str, Distribution] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # installed without its dependencies, or removed, as the Makefile says
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in done:
                done.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in found[name].requires or ()]
    return found


def licence(package: Distribution) -> str:
    """As its metadata states it: an expression, else classifiers, else the first line of a text."""
    metadata = package.metadata
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if "License ::" in c]
    stated = (metadata.get("License") or "").strip().partition("\n")[0]
    found = metadata.get("License-Expression") or " and/or ".join(
        c for c in classifiers if c != "OSI Approved"
    )
    found = (found or stated or "not stated in its metadata").replace("|", "/")
    for pattern, name in _SPELLINGS.items():
        found = re.sub(pattern, name, found)
    return found


def write_table(path: Path, packages: dict[str, Distribution]) -> None:
    """Licence -> packages, below the head of the table in ``path``; what is there of other packages stays."""
    head, line, body = path.read_text(encoding="utf-8").partition("|---|---|\n")
    known = {}
    for row in body.splitlines():
        stated, names = (cell.strip() for cell in row.strip("|").split("|"))
        known.update(dict.fromkeys(names.split(", "), stated))
    known.update({name: licence(package) for name, package in packages.items()})
    groups: dict[str, list[str]] = {}
    for name in sorted(known):
        groups.setdefault(known[name], []).append(name)
    rows = (f"| {stated} | {', '.join(groups[stated])} |\n" for stated in sorted(groups))
    path.write_text(head + line + "".join(rows), encoding="utf-8")


def main() -> None:
    """See the module text."""
    constraints, table, *requirements = sys.argv[1:]
    found = needed(requirements)
    packages = {name: found[name] for name in sorted(found) if name != OURS and not _WITH_TORCH.match(name)}
    lines = [f"{name}=={package.version}\n" for name, package in packages.items()]
    Path(constraints).write_text("# Written by `make lock`.\n" + "".join(lines), encoding="utf-8")
    write_table(Path(table), packages)
    print(f"{constraints}: {len(lines)} packages")


if __name__ == "__main__":
    main()
