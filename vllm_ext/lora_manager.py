"""vLLM's manager of adapters, for models whose experts are packed; imported where an engine has LoRA."""

from __future__ import annotations

import re

from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from bitsmoe_plugin.errors import ConfigError

_OF_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


class PackedExpertsLoRAManager(LRUCacheLoRAModelManager):
    """Refuses adapters whose tensors for experts vLLM would drop without a word."""

    def add_adapter(self, lora: LoRAModel) -> bool:
        """Raises ConfigError if the adapter has tensors for experts."""
        experts = sorted(name for name in lora.loras if _OF_EXPERTS.search(name))
        if experts:
            raise ConfigError(
                f"LoRA adapter {lora.id} has weights for experts ({experts[0]}, {len(experts)} in all), "
                "which are packed and cannot have any; train adapters on linear layers only"
            )
        return super().add_adapter(lora)


def watch_adapters() -> None:
    """Let vLLM's workers in this process make their managers from ``PackedExpertsLoRAManager``.

    That class attribute is the only place in which vLLM 0.32 says which class it makes.
    """
    LRUCacheWorkerLoRAManager._manager_cls = PackedExpertsLoRAManager
