"""Parallel degrees that cannot work, refused before vLLM starts a process for each.

A quantization config is not told the degrees before it is in one of these processes. What is told everything
at the start is the class that vLLM's table ``MODELS_CONFIG_MAP`` has for an architecture, most often none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.config import ParallelConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from bitsmoe_plugin.checkpoint.manifest import packed_spec
from bitsmoe_plugin.codec.sharding import split_blocks
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from vllm_ext.engine_checks import check_engine


def check_degrees(specs: Mapping[str, PackedSpec], parallel: ParallelConfig) -> None:
    """Refuse degrees that cannot split the rows, before vLLM divides sizes without a remainder check.

    Args:
        specs: by name of the layer.

    Raises:
        ConfigError: naming layer, sizes and the degrees that work.
    """
    if parallel.enable_expert_parallel:
        return
    # vLLM spreads the experts over the processes of all three kinds.
    parts = parallel.tensor_parallel_size * parallel.data_parallel_size
    parts *= parallel.prefill_context_parallel_size
    for name, spec in specs.items():
        split_blocks(name, spec.shape, parts, 0, spec.split_unit)


def check_threads(parallel: ParallelConfig) -> None:
    """Refuse more processes on CPUs than there are NUMA nodes for vLLM to bind them to.

    Raises:
        ConfigError: with the variable to set; vLLM's own assertion, once processes are started, names none.
    """
    processes = parallel.local_world_size
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == "auto"
    simulated = os.environ.get("VLLM_CPU_SIM_MULTI_NUMA", "0") != "0"
    if not current_platform.is_cpu() or processes == 1 or not bound or simulated:
        return
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    nodes = len(get_visible_memory_node())
    if nodes < processes:
        raise ConfigError(
            f"{processes} processes (tensor_parallel_size times pipeline_parallel_size), but vLLM gives each "
            f"a NUMA node of its own and {nodes} can be used here; set VLLM_CPU_OMP_THREADS_BIND=nobind, or "
            "to the CPUs of each process (0-3|4-7)"
        )


def check_at_start(architectures: Iterable[str]) -> None:
    """Have vLLM check packed models of these architectures as soon as it knows the degrees.

    What its table has for an architecture is still done; other models of it are none of our business.
    """
    for name in architectures:
        present = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if not issubclass(present, _Checked):
            MODELS_CONFIG_MAP[name] = type(f"Checked{present.__name__}", (_Checked, present), {})


class _Checked(VerifyAndUpdateConfig):
    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Raises ConfigError: degrees that cannot work, or see ``engine_checks``."""
        super().verify_and_update_config(vllm_config)
        model = vllm_config.model_config
        entry = getattr(model.hf_config, "quantization_config", None)
        if model.quantization != QUANT_METHOD or entry is None:
            return
        check_engine(vllm_config)
        manifest = BitsMoEConfig.checked_copy(entry)
        specs = {name: packed_spec(name, manifest) for name in manifest.layers}
        check_degrees(specs, vllm_config.parallel_config)
        check_threads(vllm_config.parallel_config)
