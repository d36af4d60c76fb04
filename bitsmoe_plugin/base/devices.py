"""Where a layer is quantized: on the device that its calibration inputs are on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from bitsmoe_plugin.base.process_state import exact_products
from bitsmoe_plugin.errors import ConfigError

CPU_WORKING_SET = 2**24
"""Values of covariances (64 MiB) of the experts that are treated together on the CPU."""
_GPU_WORKING_SET = 2**29
_GPU_BYTES_PER_VALUE = 64
"""Of a GPU's memory. 2**29 values, all experts of a layer of Qwen3-30B-A3B, from 32 GiB on."""


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Kernels are launched on ``device``, and products of float32 are not rounded to TF32.

    On the CPU nothing is changed. Where tensors are made is said where they are made.
    """
    if device.type != "cuda":
        yield
        return
    with exact_products(), torch.cuda.device(device):
        yield


def working_set(device: torch.device) -> int:
    """Values of covariances of the experts that are treated together.

    It depends on the GPU, not on what is free: another grouping may round otherwise.
    """
    if device.type == "cpu":
        return CPU_WORKING_SET
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(_GPU_WORKING_SET, memory // _GPU_BYTES_PER_VALUE)


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16. Elsewhere float32 is faster, on an Intel
    Xeon with AVX-512 VNNI alone twice."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def choose_device(name: str) -> str:
    """The device that ``--device`` means, of several processes on a machine for each its own.

    Args:
        name: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return name
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch {torch.__version__} finds no such device; use cpu or auto")
    count = torch.cuda.device_count()
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")) % count
    if index >= count:
        raise ConfigError(f"--device {name}: there are {count} GPUs, numbered from 0")
    return f"cuda:{index}"
