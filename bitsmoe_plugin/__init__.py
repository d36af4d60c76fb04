"""BitsMoE: 2-bit Mixture-of-Experts models for transformers and vLLM.

Importing this package registers the quantization method ``bitsmoe`` with transformers.
"""

from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import BitsMoEError, CheckpointError, ConfigError, QuantizationError
from bitsmoe_plugin.integrations.transformers import BitsMoEQuantizer, register
from bitsmoe_plugin.version import __version__

__all__ = [
    "BitsMoEConfig",
    "BitsMoEError",
    "BitsMoEQuantizer",
    "CheckpointError",
    "ConfigError",
    "QuantizationError",
    "__version__",
]

register()
