"""``python -m bitsmoe_plugin``: help, version, wrong arguments are answered before all is imported."""

import importlib
import sys
import traceback

import bitsmoe_plugin
from bitsmoe_plugin.base.error_lines import one_line
from bitsmoe_plugin.base.waiting_threads import wait_passively_to_quantize
from bitsmoe_plugin.cli import build_parser, run


def main() -> int:
    """Run the command line; returns its exit status, 2 if the package cannot be imported."""
    wait_passively_to_quantize(sys.argv[1:])
    args = build_parser().parse_args()
    try:
        importlib.reload(bitsmoe_plugin)  # with what it left out when it was found
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {one_line(error)} (`bitsmoe doctor` says what to do)"
        print(f"bitsmoe: error: {what}", file=sys.stderr)
        return 2
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
