"""The program ``bitsmoe``, also where what it is made of cannot be imported.

Here and not in bitsmoe_plugin, which imports transformers: where that fails, users should be told why in one
line, and ``bitsmoe doctor`` what to do. Help, version and wrong arguments are answered before it is imported.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec, module_from_spec


def main(argv: Sequence[str] | None = None, program: str = "bitsmoe") -> int:
    """Run the command line; returns its exit status, 2 if it cannot be imported.

    Args:
        argv: arguments after the program's name; those of the process if None.
        program: what users typed before them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["doctor"]:
        from vllm_ext.doctor import main as doctor

        return doctor(argv[1:])
    try:
        import_package = _package()
        from bitsmoe_plugin.base.waiting_threads import wait_passively_to_quantize
        from bitsmoe_plugin.cli import build_parser, run

        wait_passively_to_quantize(argv)
        args = build_parser(program).parse_args(argv)
        import_package()
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        print(
            f"{program}: error: {type(error).__name__}: {reason} (`bitsmoe doctor` says what to do)",
            file=sys.stderr,
        )
        return 2
    return run(args, program)


def _package() -> Callable[[], object]:
    """Make bitsmoe_plugin's modules importable without the package's own code, which imports transformers;
    returns what runs that."""
    spec = find_spec("bitsmoe_plugin")
    if "bitsmoe_plugin" in sys.modules or spec is None or spec.loader is None:
        return lambda: None
    package = sys.modules["bitsmoe_plugin"] = module_from_spec(spec)
    return partial(spec.loader.exec_module, package)
