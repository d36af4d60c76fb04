"""How threads of torch wait for each other; read when torch is imported, so of no use later.

Threads that spin while they wait for another take the time of that other where more threads are busy than
there are cores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def wait_passively_to_quantize(argv: Sequence[str]) -> None:
    """Where a command line, without the program's name, begins with ``quantize``: idle threads are to sleep,
    unless the user said otherwise."""
    if argv[:1] == ["quantize"]:
        os.environ.update(waiting_passively())


def waiting_passively() -> dict[str, str]:
    """The environment for a process whose idle threads are to sleep, unless the user said otherwise."""
    return {**_PASSIVE, **os.environ}
