"""The Triton kernels compiled for GPUs that are not there, by the command that reports their resources.

In a process of its own: Triton either interprets or compiles, and the other tests interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

KERNELS = {"gate_up", "group", "scale", "grouped_gate_up", "grouped_down", "combine"}
DENSE = {"expand_rows", "dense_gate_up", "dense_down"}
BASES = {f"{kernel} {bits} bits" for kernel in ("scaled_matvec", "output", "expand") for bits in (4, 8, 16)}
DECODING = {"gate_up", "grouped_gate_up", "grouped_down"} | {name for name in BASES if "output" in name}
BASES_4 = {name for name in BASES if name.endswith(" 4 bits")}
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes per program, CUDA C++ programming guide, table of compute capabilities."""


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bitsmoe_plugin.runtime.triton.compile", *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


def resources(*arguments: str) -> list[dict]:
    done = run_module("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(table: list[dict], kernels: set[str], most: float, decode: float = 9, spilled: int = 0) -> None:
    """No more spills than ``spilled`` bytes, and no loop of prefill takes more than ``most`` instructions per
    weight, none of decode more than ``decode``: it has chains of loads in its loops, and sums in float32."""
    assert {row["kernel"] for row in table} == kernels
    for row in table:
        assert max(row["stack"], row["spill_stores"], row["spill_loads"]) <= spilled, row
        assert 16 <= row["registers"] <= 255, row
        assert row["shared"] <= MOST_SHARED[row["capability"]], row
        assert bool(row["instructions"]) == (row["kernel"] in DECODING)
        limit = most if row["pairs"] else decode
        assert all(1.5 < count <= limit for count in row["instructions"].values()), row


def test_no_kernel_spills_or_decodes_slowly() -> None:
    """Sizes of Qwen3-30B-A3B in bfloat16, one token and 256: a spill turns registers into memory traffic, and
    with 20 instructions per weight, which gathers and masks take, prefill was slower than bfloat16."""
    table = resources("--capability", "90", "--dtype", "bfloat16", "--tokens", "1", "256")
    check(table, KERNELS | BASES, 6.5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("capability", "most"), [(80, 14), (90, 8), (100, 8), (120, 14)])
def test_no_kernel_spills_on_any_gpu(capability: int, most: float) -> None:
    """All sizes of tiles, both 16-bit dtypes. Where tensor cores take their factors from registers, these are
    moved there, and products of 64 pairs are most of the instructions."""
    table = resources("--capability", str(capability))
    check(table, KERNELS | BASES | DENSE, most)
    for dtype in ("float16", "bfloat16"):
        assert {
            row["kernel"] for row in table if dtype in row["dtypes"].split("/")
        } == KERNELS | BASES | DENSE
    sizes = {row["pairs"] for row in table if row["kernel"] == "grouped_down"}
    assert sizes == {16, 32, 64, 128} - ({128} if capability != 90 else set())


@pytest.mark.exhaustive
def test_float32_does_not_spill() -> None:
    """Products with bases by a kernel of ours, rows by fused multiply-adds: few use it, and slowly."""
    table = resources("--capability", "90", "--dtype", "float32", "--tokens", "1", "64")
    kernels = KERNELS | BASES | {f"matmul {bits} bits" for bits in (4, 8, 16)}
    assert {row["kernel"] for row in table} == kernels - {name for name in BASES if name.startswith("expand")}
    assert all(row["spill_stores"] == row["spill_loads"] == row["stack"] == 0 for row in table)


@pytest.mark.exhaustive
def test_the_uniform_grid_does_not_spill() -> None:
    """Another way to decode rows of up to 4 bits; two input bases, group 16 and a tail."""
    table = resources(
        *("--capability", "90", "--dtype", "bfloat16", "--grid", "uniform", "--basis-bits", "4"),
        *("--tokens", "1", "256"),
        *("--input-bases", "2", "--group-size", "16", "--hidden", "720", "--intermediate", "200"),
    )
    check(table, KERNELS | BASES_4, 7)


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", ["80", "90", "100", "120"])
def test_the_grid_of_converted_checkpoints_does_not_spill(capability: str) -> None:
    """Scales are loaded and multiplied in the loops, per value. On sm_100 one word is spilled."""
    table = resources(
        *("--capability", capability, "--dtype", "bfloat16", "--grid", "tiled", "--basis-bits", "8"),
        *("--tokens", "1", "256", "8192"),
    )
    check(table, KERNELS | DENSE | {name for name in BASES if name.endswith(" 8 bits")}, 20, 13, spilled=8)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "form",
    [
        ("--gating", "silu,alpha=1.702,limit=7,offset=1", "--bias", "--hidden", "2880", "--group-size", "32"),
        ("--gating", "relu2,has_gate=0", "--no-gate", "--intermediate", "1856"),
        ("--gating", "silu,gate_cap=4,up_cap=25"),
    ],
    ids=["GPT-OSS", "Nemotron-H", "Inkling2"],
)
def test_other_forms_of_experts_do_not_spill(form: tuple[str, ...]) -> None:
    """Biases and clamps take registers in the kernel that has the fewest to spare."""
    table = resources(
        "--capability", "90", "--dtype", "bfloat16", "--basis-bits", "4", "--tokens", "1", "256", *form
    )
    check(table, KERNELS | BASES_4, 7)


def test_the_kernels_that_quantize_do_not_spill() -> None:
    """Four trellis searches in one kernel, and the uniform grid's."""
    for grid in ("trellis", "uniform"):
        table = resources("--rounding", "--capability", "90", "--grid", grid)
        assert {row["kernel"] for row in table} == {"round", "choose", "pack"}
        assert all(row["spill_stores"] == row["spill_loads"] == row["stack"] == 0 for row in table)


def test_interpreted_kernels_are_not_compiled() -> None:
    """Says what is wrong, instead of failing deep inside Triton."""
    done = run_module("--capability", "90", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr


def test_the_package_itself_does_not_import_its_kernels() -> None:
    """Triton is no dependency: a machine without it must be able to import everything else."""
    code = (
        "import sys, bitsmoe_plugin, bitsmoe_plugin.models.gating, bitsmoe_plugin.runtime.experts\n"
        "import bitsmoe_plugin.runtime.dispatch\n"
        "print([name for name in sys.modules if name.startswith('bitsmoe_plugin.runtime.triton.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
