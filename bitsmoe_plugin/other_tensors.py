"""The tensors of a packed checkpoint that are not packed: recorded when it is saved, checked before use.

Loaders notice little of what is wrong with them: transformers warns about a missing one, vLLM serves
whatever its memory held.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitsmoe_plugin.checkpoint_files import read_header
from bitsmoe_plugin.errors import CheckpointError

_DIGITS = 16


def fingerprint(tensor: Tensor) -> str:
    """Start of the SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def record(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> fingerprint of all tensors that are not packed, under the names that they are saved by."""
    return {name: fingerprint(tensor) for name, tensor in sorted(tensors.items()) if not _packed(name)}


def _packed(name: str) -> bool:
    return ".bitsmoe_" in name


def verify_others(files: Iterable[str | Path], recorded: dict[str, Any]) -> None:
    """Compare the tensors of some safetensors files with what was recorded; reads them all.

    Args:
        recorded: from ``record``; empty for a checkpoint that has no record, which is not checked.

    Raises:
        CheckpointError: naming a tensor that is missing, surplus or altered.
    """
    if not recorded:
        return
    missing = dict(recorded)
    for path in map(Path, files):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    if not _packed(name):
                        _check(name, file.get_tensor(name), missing.pop(name, None))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error
    if missing:
        raise CheckpointError(f"{', '.join(sorted(missing))} is missing from the checkpoint")


def _check(name: str, tensor: Tensor, recorded: str | None) -> None:
    if recorded is None:
        raise CheckpointError(f"{name} is in the checkpoint, but was not when it was written")
    if fingerprint(tensor) != recorded:
        raise CheckpointError(f"{name} differs from what was written; the checkpoint is damaged or altered")


def stored_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of some safetensors files that are not packed, from the headers alone.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    return {
        name: tuple(entry["shape"])
        for path in files
        for name, entry in read_header(Path(path)).items()
        if not _packed(name)
    }


def prediction_layers(model: Any, files: Iterable[str | Path]) -> dict[str, str]:
    """Tensors of a checkpoint that transformers has no module for but that belong to the model.

    Those are layers for multi-token prediction, which a model class declares as ignored or which are numbered
    like decoder layers beyond the last.

    Returns:
        name -> file.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    own = {_place(name) for name in model.state_dict()}
    found = {}
    for path in (str(file) for file in files if str(file).endswith(".safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error
        for name in names:
            place = _place(name)
            declared = any(re.search(pattern, name) for pattern in patterns)
            if place not in own and (declared or re.sub(r"\d+\.$", "0.", place) in own):
                found[name] = path
    return found


def _place(name: str) -> str:
    """A name up to its first number, or to its first dot if it has none."""
    match = re.match(r".*?\.\d+\.", name) or re.match(r"[^.]*\.", name)
    return match[0] if match else name
