"""The program ``bitsmoe``, also where what it is made of cannot be imported.

Here and not in bitsmoe_plugin, which imports transformers: where that fails, users should be told why in one
line, and ``bitsmoe doctor`` what to do.
"""

from __future__ import annotations

import sys
import traceback


def main() -> int:
    """Run the command line; returns its exit status, 2 if it cannot be imported."""
    if sys.argv[1:2] == ["doctor"]:
        from vllm_ext.doctor import main as doctor

        return doctor(sys.argv[2:])
    try:
        from bitsmoe_plugin.cli import main as run
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        print(
            f"bitsmoe: error: {type(error).__name__}: {reason} (`bitsmoe doctor` says what to do)",
            file=sys.stderr,
        )
        return 2
    return run()
