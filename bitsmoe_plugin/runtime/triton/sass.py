"""How many instructions a compiled kernel spends on a weight, read from its machine code.

Triton brings NVIDIA's disassembler, so this needs no GPU and no CUDA toolkit.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from bitsmoe_plugin.base.triton_launch import Launch

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*);")

_PRODUCT = re.compile(r"FFMA|FMUL|\w*MMA")


def instructions(cubin: bytes) -> tuple[list[str], list[range]]:
    """Names of a kernel's instructions, and the stretches of its innermost loops, as they come."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _parse(text)


def _parse(text: str) -> tuple[list[str], list[range]]:
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append((instruction.group(1), instruction.group(2)))
    loops = []
    for place, (name, operands) in enumerate(found):
        target = re.search(r"\.L_x_\d+", operands)
        if name.startswith("BRA") and target and labels.get(target.group(), place + 1) <= place:
            loops.append(range(labels[target.group()], place + 1))
    inner = [a for a in loops if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)]
    return [name for name, _ in found], inner


def decoding_instructions(cubin: bytes, launch: Launch) -> dict[int, float]:
    """Instructions of the loop of each width per weight that a thread decodes, empty if none does.

    Raises:
        ValueError: there are more or fewer loops that decode than widths.
    """
    constants = launch.constants
    if not {"WIDTHS", "ROWS", "BLOCKS"} <= constants.keys():
        return {}
    names, inner = instructions(cubin)
    # Loops that wait, copy or write zeros are shorter, or multiply nothing.
    weights = constants["ROWS"] * constants["BLOCKS"] / launch.num_warps
    decoding = [
        loop
        for loop in inner
        if len(loop) >= 2 * weights and any(_PRODUCT.match(name) for name in names[loop.start : loop.stop])
    ]
    if "BASIS_WORDS" in constants:  # a basis is multiplied after the rows, in a loop that is no width's
        decoding = decoding[:-1]
    if not decoding:
        return {}
    widths = constants["WIDTHS"]
    if len(decoding) != len(widths):
        raise ValueError(f"{len(decoding)} loops decode, of {len(widths)} widths")
    return {width: round(len(r) / weights, 2) for width, r in zip(widths, decoding, strict=True)}
