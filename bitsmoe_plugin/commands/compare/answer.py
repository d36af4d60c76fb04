"""How the process of another quantizer answers ``bitsmoe compare``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.error_lines import told
from bitsmoe_plugin.base.stdout import stdout_to_stderr


def answer(name: str, model: Path, quantize: Callable[[], dict[str, Any]]) -> int:
    """Print what ``quantize`` returns as one JSON line on stdout, or ``{"error": ...}``; all else goes to
    stderr.

    Args:
        name: of the program, for stderr.
        model: what is quantized, for errors.

    Returns:
        exit status, 1 after an error.
    """
    try:
        with stdout_to_stderr() as stdout:
            print(json.dumps(quantize()), file=stdout)
    except Exception as error:
        print(f"{name}: {error}", file=sys.stderr)
        print(json.dumps({"error": told(error, str(model))}))
        return 1
    return 0
