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

KERNELS = {"gate_up", "activate", "down", "combine", "grouped_gate_up", "grouped_down"}
BASES = {f"{kernel} {bits} bits" for kernel in ("matvec", "matmul") for bits in (4, 8, 16)}
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes per program, CUDA C++ programming guide, table of compute capabilities."""


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bitsmoe_plugin.runtime.triton.compile", *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


def resources(*arguments: str) -> list[dict]:
    done = run_module("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.exhaustive), 90, pytest.param(100, marks=pytest.mark.exhaustive)],
)
def test_no_kernel_spills(capability: int) -> None:
    """Sizes of Qwen3-30B-A3B, float16 and bfloat16: a spill turns registers into memory traffic."""
    table = resources("--capability", str(capability))
    assert {row["kernel"] for row in table} == KERNELS | BASES
    for dtype in ("float16", "bfloat16"):
        assert {row["kernel"] for row in table if dtype in row["dtypes"].split("/")} == KERNELS | BASES
    for row in table:
        assert row["capability"] == capability
        assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0), row
        assert 16 <= row["registers"] <= 255, row
        assert row["shared"] <= MOST_SHARED[capability], row


def test_the_uniform_grid_does_not_spill() -> None:
    """Another way to decode rows of up to 4 bits; two input bases, group 16 and a tail."""
    table = resources(
        *("--capability", "90", "--dtype", "bfloat16", "--grid", "uniform", "--basis-bits", "4"),
        *("--input-bases", "2", "--group-size", "16", "--hidden", "720", "--intermediate", "200"),
    )
    assert {row["kernel"] for row in table} == KERNELS | {"matvec 4 bits", "matmul 4 bits"}
    assert all(row["spill_stores"] == row["spill_loads"] == row["stack"] == 0 for row in table)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "form",
    [
        ("--gating", "silu,alpha=1.702,limit=7,offset=1", "--bias", "--hidden", "2880", "--group-size", "32"),
        ("--gating", "relu2,has_gate=0", "--no-gate", "--intermediate", "1856"),
    ],
    ids=["GPT-OSS", "Nemotron-H"],
)
def test_other_forms_of_experts_do_not_spill(form: tuple[str, ...]) -> None:
    """Biases and clamps take registers in the kernel that has the fewest to spare."""
    table = resources("--capability", "90", "--dtype", "bfloat16", "--basis-bits", "4", *form)
    assert {row["kernel"] for row in table} == KERNELS | {"matvec 4 bits", "matmul 4 bits"}
    assert all(row["spill_stores"] == row["spill_loads"] == row["stack"] == 0 for row in table)


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
