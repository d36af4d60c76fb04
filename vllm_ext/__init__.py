"""Serve BitsMoE checkpoints with vLLM, and what torch loads on import (``autoload``).

Importing this package imports neither vLLM, nor torch, nor bitsmoe_plugin.
"""

import logging


def register() -> None:
    """Make vLLM know ``quant_method: bitsmoe``; its plugin loader calls this in every process.

    Safe to call more than once. If a package is too old for it, it logs an error: the plugin loader passes
    exceptions on, and servers of other models would not start.
    """
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        if "bitsmoe" in QUANTIZATION_METHODS:
            return
        from bitsmoe_plugin.base.tested_versions import check_versions

        check_versions("vllm")
        from vllm_ext.architectures import register_names
        from vllm_ext.config import BitsMoEServingConfig
    except ImportError as error:
        # A child of vLLM's logger, which has its handlers.
        logging.getLogger("vllm.bitsmoe_plugin").error("BitsMoE checkpoints cannot be served: %s", error)
        return
    register_quantization_config("bitsmoe")(BitsMoEServingConfig)
    register_names()
