"""Packed checkpoints load in transformers without an import of ours.

torch calls ``install`` at the end of ``import torch``: the entry point group ``torch.backends`` is its
documented way for other packages to be there without being imported. (A .pth file would run in every
Python of the environment, torch or not, and wheels have no supported way to install one.) transformers
has no such group, so ``install`` waits for its table of quantization methods to be loaded and registers
a stand-in there, which imports bitsmoe_plugin once a packed checkpoint is loaded.

This runs in processes that have nothing to do with BitsMoE, and an entry point that raises breaks
``import torch``. So this module imports the standard library alone, and it is in vllm_ext, whose
``__init__`` is empty as well; bitsmoe_plugin takes a second to import.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SWITCH = "BITSMOE_DISABLE_AUTOLOAD"
QUANT_METHOD = "bitsmoe"  # as in bitsmoe_plugin.config, which must not be imported here
_TABLE = "transformers.quantizers.auto"
# The second for a process in which the table is half loaded when it imports torch for the first time.
_AWAITED = (_TABLE, "transformers.modeling_utils")


def install() -> None:
    """Register with transformers if it is loaded, otherwise when it will be. Never raises."""
    try:
        if not _register(sys.modules.get(_TABLE)):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"bitsmoe-plugin could not register with transformers ({error!r}); import bitsmoe_plugin before "
        "loading packed checkpoints",
        stacklevel=2,
    )


def _register(table: ModuleType | None) -> bool:
    """Whether the method is known now; False while there is no table or it is half loaded."""
    if not hasattr(table, "register_quantization_config"):
        return False
    if QUANT_METHOD not in table.AUTO_QUANTIZATION_CONFIG_MAPPING:  # type: ignore[union-attr]
        table.register_quantization_config(QUANT_METHOD)(_stand_in())  # type: ignore[union-attr]
    return True


def _stand_in() -> type:
    """A config class that becomes BitsMoEConfig when a checkpoint's config is read."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class BitsMoEStandIn(QuantizationConfigMixin):
        stands_in_for = QUANT_METHOD

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if os.environ.get(SWITCH, "0") not in ("", "0"):
                raise ImportError(
                    f"this checkpoint is packed by bitsmoe-plugin, which {SWITCH} keeps from being imported "
                    "on its own; unset it, or import bitsmoe_plugin before loading"
                )
            from bitsmoe_plugin import BitsMoEConfig  # registers itself in place of the stand-in

            return BitsMoEConfig.from_dict(config_dict, *args, **kwargs)

    return BitsMoEStandIn


class _Finder(MetaPathFinder):
    """Finds the awaited modules where the other finders do, with a loader that registers afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _AWAITED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs another loader, then registers."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: tools read its source through it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            _register(sys.modules.get(_TABLE))
        except Exception as error:
            _warn(error)
