"""How threads of torch wait for each other."""

from __future__ import annotations

import os
from collections.abc import Sequence


def wait_passively_to_quantize(argv: Sequence[str]) -> None:
    """Where a command line, without the program's name, begins with ``quantize``: idle threads are to sleep,
    unless the user said otherwise.

    Read when torch is imported, so it is of no use later. Threads that spin while they wait for another take
    the time of that other where more threads are busy than there are cores.
    """
    if argv[:1] == ["quantize"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
