"""Processes of methods and of peers: what they print on stdout, and how they ended."""

from __future__ import annotations

import json
import subprocess


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """What a process that failed had to say: a JSON object with ``error`` at the end of its stdout."""
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode} (9: most often for lack of memory)"
    try:
        return str(json.loads(done.stdout.strip().splitlines()[-1])["error"])
    except (ValueError, LookupError, TypeError):
        return f"its process ended with status {done.returncode}; what it said is above"
