"""The compiled C of this package: ``csrc``, built at installation, called through ctypes."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from ctypes import c_char_p
from functools import cache
from pathlib import Path

from torch import Tensor

from bitsmoe_plugin.errors import ConfigError

AMX = "BITSMOE_AMX"
"""Environment variable: 0 does without AMX where a CPU has it, and does not ask the system for it."""


def library_in(folder: Path) -> Path | None:
    """The library that this Python would load from a folder, None if there is none."""
    paths = (folder / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


@cache
def library() -> ctypes.CDLL | None:
    """The library, None if there is none that can be loaded; ``absence`` says why.

    Raises:
        ConfigError: ``BITSMOE_AMX`` is neither 0 nor 1.
    """
    path = library_in(Path(__file__).parent)
    if path is None:
        return None
    try:
        lib = ctypes.CDLL(str(path))
    except OSError:
        return None
    lib.bitsmoe_select.argtypes, lib.bitsmoe_select.restype = [c_char_p], c_char_p
    lib.bitsmoe_select_tiles.argtypes, lib.bitsmoe_select_tiles.restype = [c_char_p], c_char_p
    lib.bitsmoe_allow_amx(_is_amx_wanted())
    lib.bitsmoe_select(None)
    return lib


def _is_amx_wanted() -> bool:
    text = os.environ.get(AMX, "1")
    if text not in ("", "0", "1"):
        raise ConfigError(f"{AMX}={text!r} is neither 0 nor 1; 0 does without AMX")
    return text != "0"


def select(name: str | None) -> str | None:
    """Use the code of one instruction set ("avx512", "avx2", "portable"), None: the best of this machine.

    Returns:
        the name of what is now in use; None if this machine cannot run it, and nothing changed.
    """
    lib = library()
    chosen = None if lib is None else lib.bitsmoe_select(None if name is None else name.encode())
    return None if chosen is None else chosen.decode()


def select_tiles(name: str | None) -> str | None:
    """Use tile instructions with the code for AVX-512, from some tokens per expert on; results are the same.

    Args:
        name: "amx", "none", "model" (a model of them in C, for tests), None: the best of this machine.

    Returns:
        what is now in use, "refused" if the CPU has them and the system refuses them; None if they are not to
        be had here, and nothing changed.
    """
    lib = library()
    chosen = None if lib is None else lib.bitsmoe_select_tiles(None if name is None else name.encode())
    return None if chosen is None else chosen.decode()


def pointer(tensor: Tensor) -> int:
    """Address of a contiguous tensor on the CPU."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()
