"""BitsMoE: 2-bit Mixture-of-Experts models for transformers and vLLM.

The rooms in the order of the flow: models, calibration -> spectral -> allocation -> rounding (with codec) ->
checkpoint -> runtime; pipeline runs them, commands and integrations are the doors, base helps all.

Importing this package registers the quantization method ``bitsmoe`` with transformers, and loads no room that
this does not need.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bitsmoe_plugin.base.tested_versions import check_companions, check_versions


def _is_program() -> bool:
    """Whether this is ``python -m bitsmoe_plugin``: ``__main__`` answers some of it and comes back."""
    name = sys.orig_argv[-len(sys.argv) :][:1]
    return sys.argv[:1] == ["-m"] and name in (["bitsmoe_plugin"], ["-mbitsmoe_plugin"])


if not _is_program():
    check_versions("torch", "transformers")  # before what an older release would break is imported
    try:
        from bitsmoe_plugin.config import BitsMoEConfig
        from bitsmoe_plugin.errors import (
            BitsMoEError,
            CheckpointError,
            ConfigError,
            QuantizationError,
            VersionError,
        )
        from bitsmoe_plugin.integrations.transformers import BitsMoEQuantizer, register
        from bitsmoe_plugin.version import __version__

        register()
    except Exception as error:
        check_companions(error)
        raise

if TYPE_CHECKING:
    from bitsmoe_plugin.commands.model_card import write_model_card

__all__ = [
    "BitsMoEConfig",
    "BitsMoEError",
    "BitsMoEQuantizer",
    "CheckpointError",
    "ConfigError",
    "QuantizationError",
    "VersionError",
    "__version__",
    "write_model_card",
]


def __getattr__(name: str) -> Any:
    if name == "write_model_card":  # with all that reading a packed model needs
        from bitsmoe_plugin.commands.model_card import write_model_card

        return write_model_card
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
