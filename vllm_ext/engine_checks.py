"""Options of vLLM's engine that packed experts cannot follow, refused by name before any weight is read.

Each would start, and then compute something else than was asked for, or fail at the first request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import vllm.envs as envs
from vllm.config import VllmConfig

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.runtime import batch_invariance

LOAD_FORMATS = ("auto", "hf", "safetensors")
"""Formats whose files lie on a local disk as they were written; the packed tensors are read there."""
ALL2ALL_BACKEND = "allgather_reducescatter"
"""The only one whose dispatch vLLM itself runs for a method that has no kernel of vLLM's."""
WEIGHT_TRANSFERS = ("nccl", "ipc")
"""Those that hand tensors of the checkpoint to ``load_weights``; others write into parameters as they are."""
_EXPERTS = {"model", "language_model", "layers", "mlp", "block_sparse_moe", "experts", "routed_experts"}
"""Segments that names of experts' parameters are made of, besides numbers and ``bitsmoe_...``."""


def check_engine(config: VllmConfig) -> None:
    """Refuse what would leave packed experts behind.

    Raises:
        ConfigError: naming the option, and what to do.
    """
    _check_load_format(config.load_config)
    _check_online(config.model_config.quantization_config)
    _check_offloading(config.offload_config)
    _check_transfer(config.weight_transfer_config)
    _check_dispatch(config.parallel_config, config.device_config.device)
    if envs.VLLM_BATCH_INVARIANT:
        batch_invariance.refuse_device(config.device_config.device, "VLLM_BATCH_INVARIANT")
    if batch_invariance.is_wanted():
        batch_invariance.refuse_device(config.device_config.device)


def _check_load_format(load: Any) -> None:
    if load.load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format {load.load_format!r} passes by the safetensors files that packed experts are read "
            f"from; use --load-format {LOAD_FORMATS[0]}, with a local directory or a name on the hub"
        )


def _check_online(asked: Any) -> None:
    """Of layers that are named one by one, each is checked when it is made."""
    if asked is not None and asked.moe is not None and not asked.ignore:
        raise ConfigError(
            f"--quantization-config would quantize packed experts once more (moe: {asked.moe}); give it "
            '"linear" alone'
        )


def _check_offloading(offload: Any) -> None:
    """vLLM moves parameters away when it makes modules; those of packed experts appear after that."""
    uva, prefetch = offload.uva, offload.prefetch
    options = {
        "--cpu-offload-gb": (uva.cpu_offload_gb, "--cpu-offload-params", uva.cpu_offload_params),
        "--offload-group-size": (prefetch.offload_group_size, "--offload-params", prefetch.offload_params),
    }
    for option, (amount, selection, names) in options.items():
        if amount and _selects_experts(names):
            raise ConfigError(
                f"{option} {amount:g} would leave packed experts on the device without a word; drop it "
                f"(they are a fraction of the model), or name other layers with {selection}, as self_attn"
            )


def _selects_experts(names: Iterable[str]) -> bool:
    """vLLM matches names of parameters segment by segment; no names select all."""
    selected = [name.split(".") for name in names]
    return not selected or any(
        all(part in _EXPERTS or part.isdecimal() or part.startswith("bitsmoe_") for part in parts)
        for parts in selected
    )


def _check_transfer(transfer: Any) -> None:
    if transfer is not None and transfer.backend not in WEIGHT_TRANSFERS:
        raise ConfigError(
            f"weight transfer by {transfer.backend!r} writes into parameters of the sizes that they have, "
            f"and those of packed experts change; use {' or '.join(WEIGHT_TRANSFERS)}"
        )


def _check_dispatch(parallel: Any, device: Any) -> None:
    if parallel.enable_eplb:
        raise ConfigError(
            "--enable-eplb moves experts between processes, which packed experts do not know; drop it"
        )
    if parallel.data_parallel_size > 1 and torch.device(device).type == "cpu":
        raise ConfigError(
            f"data_parallel_size {parallel.data_parallel_size}: vLLM on a CPU has no data parallel experts; "
            "use --tensor-parallel-size, or several servers"
        )
    if parallel.use_all2all and parallel.all2all_backend != ALL2ALL_BACKEND:
        raise ConfigError(
            f"all2all_backend {parallel.all2all_backend!r} dispatches tokens only to vLLM's own kernels; use "
            f"--all2all-backend {ALL2ALL_BACKEND}"
        )
