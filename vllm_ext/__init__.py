"""Serve BitsMoE checkpoints with vLLM, and what torch loads on import (``autoload``).

Importing this package imports nothing: neither vLLM, nor torch, nor bitsmoe_plugin.
"""


def register() -> None:
    """Make vLLM know ``quant_method: bitsmoe``; its plugin loader calls this in every process.

    Safe to call more than once.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "bitsmoe" in QUANTIZATION_METHODS:
        return
    from vllm_ext.config import BitsMoEServingConfig

    register_quantization_config("bitsmoe")(BitsMoEServingConfig)
