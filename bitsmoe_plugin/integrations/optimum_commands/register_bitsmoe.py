"""``optimum-cli bitsmoe ...``: optimum reads this file, in its namespace, each time it starts.

So it imports nothing of ours: that would cost every command of optimum-cli two seconds, and an error in it
would break them all. The command line is that of ``bitsmoe``, which is imported when it is called.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

COMMANDS = (
    "estimate",
    "quantize",
    "tune",
    "write",
    "inspect",
    "report",
    "evaluate",
    "compare",
    "dequantize",
    "import-upstream",
    "bench",
    "env",
    "doctor",
)


class BitsMoECommand(BaseOptimumCLICommand):
    """Hands its arguments on to the program ``bitsmoe``, which defines and checks them."""

    COMMAND = CommandInfo(name="bitsmoe", help="Quantize Mixture-of-Experts language models to 2 bits.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """One argument that takes all that follows, ``--help`` included."""
        parser.description = (
            "Quantize Mixture-of-Experts language models to 2 bits. COMMAND is one of "
            f"{', '.join(COMMANDS)}; `optimum-cli bitsmoe COMMAND --help` explains it. "
            "The same as the program `bitsmoe`."
        )
        parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...")

    def run(self) -> None:
        """Exits with the status of the command."""
        from vllm_ext.command import main

        sys.exit(main(self.args.arguments, program="optimum-cli bitsmoe"))


REGISTER_COMMANDS = [BitsMoECommand]
