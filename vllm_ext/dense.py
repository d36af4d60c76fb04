"""Linear layers in 8 or 4 bits (``dense_bits``): vLLM's own compressed-tensors method serves them."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from bitsmoe_plugin.codec.dense import dense_schemes
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from vllm_ext.unpacked_kernel import register_unpacked


class DenseLayers:
    """Those of a checkpoint.

    Args:
        section: ``BitsMoEConfig.dense``.

    Raises:
        CheckpointError: it is none that was written by this package.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        self._section = section
        self._found: set[str] = set()  # of the targets
        self._seen: set[int] = set()  # numbers of decoder layers that this process has
        self._config: CompressedTensorsConfig | None = None
        if dense_schemes(section):
            self._config = CompressedTensorsConfig.from_config(copy.deepcopy(section))

    def rename(self, mapper: WeightsMapper) -> None:
        """Learn how vLLM's model names its modules."""
        if self._config is not None:
            self._config.apply_vllm_mapper(mapper)

    def method(
        self, layer: Any, prefix: str, packed_modules: dict[str, list[str]]
    ) -> QuantizeMethodBase | None:
        """vLLM's method for a layer, None if it is not stored in fewer bits.

        Args:
            layer: a linear layer or the head.
            packed_modules: vLLM's name of layers that it stores as one -> their names in the checkpoint.

        Raises:
            ConfigError: vLLM could not compute it here.
        """
        if self._config is None:
            return None
        register_unpacked()  # in each process
        self._note(prefix, packed_modules)
        self._config.packed_modules_mapping = packed_modules
        scheme = self._config.get_scheme_dict(layer, prefix)
        if scheme is None:
            return None
        _check_kernel(layer, prefix, scheme["weights"])
        return self._config.get_quant_method(layer, prefix)

    def _note(self, prefix: str, packed_modules: dict[str, list[str]]) -> None:
        parent, _, kind = prefix.rpartition(".")
        parts = packed_modules.get(kind, [kind])
        self._found.update(f"{parent}.{part}" if parent else part for part in parts)
        self._seen.add(_number(prefix))

    def check_asked(self) -> None:
        """Refuse a model that makes some of the layers without asking how they are stored; once it is made.

        Raises:
            ConfigError: naming one.
        """
        targets = self._config.target_scheme_map if self._config is not None else ()
        missing = sorted(t for t in targets if _number(t) in self._seen and t not in self._found)
        if missing and -1 not in map(_number, missing):
            raise ConfigError(
                f"vLLM's model computes {missing[0]} unquantized, and the checkpoint has it in fewer bits; "
                f"quantize with dense_bits that leaves it at 16 ({len(missing)} such layers)"
            )

    def check_same(self, section: dict[str, Any]) -> None:
        """Refuse another checkpoint for the same engine whose layers are stored in other widths.

        Raises:
            CheckpointError: always, if so.
        """
        if section != self._section:
            raise CheckpointError(
                "the checkpoint to reload has its linear layers (dense_bits) in other widths than the one "
                "that is served; restart vLLM with it"
            )


def _check_kernel(layer: Any, prefix: str, weights: Any) -> None:
    inputs, group = getattr(layer, "input_size_per_partition", None), weights.group_size
    if inputs is not None and inputs % group:
        raise ConfigError(
            f"{prefix}: tensor parallelism leaves each process {inputs} inputs, which cuts groups of {group}"
            "; use a smaller tensor_parallel_size, or quantize with dense_group_size 32"
        )
    dtype = get_current_vllm_config().model_config.dtype
    if current_platform.is_cpu() and weights.num_bits == 4 and dtype == torch.float32:
        raise ConfigError(
            f"{prefix} is in 4 bits, which vLLM computes on a CPU in 16 bits alone; start it with --dtype "
            "bfloat16"
        )


def _number(name: str) -> int:
    """Of the decoder layer; -1: in none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1
