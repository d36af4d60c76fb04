"""The tensors of a packed checkpoint that are not packed: recorded when it is saved, checked before use.

Loaders notice little of what is wrong with them: transformers warns about a missing one, vLLM serves
whatever its memory held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import open_tensors, read_header
from bitsmoe_plugin.models.stand_ins import is_stand_in

_DIGITS = 16
_REMEDY = "; if this is on purpose, save the model with transformers' save_pretrained, which records it anew"


def fingerprint(tensor: Tensor) -> str:
    """Start of the SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def record(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> fingerprint of all tensors that are not packed."""
    return {name: fingerprint(tensor) for name, tensor in sorted(tensors.items()) if not _packed(name)}


def _packed(name: str) -> bool:
    return ".bitsmoe_" in name


def verify_others(
    files: Iterable[str | Path],
    recorded: dict[str, Any],
    in_model: dict[str, Any],
    tied: Mapping[str, str],
    *,
    as_saved: bool = False,
) -> None:
    """Compare the tensors of some safetensors files with what was recorded; reads them all.

    Files of any saver of a model with these tensors are accepted: under the names that ``save_pretrained``
    gives or the model's own, with tied tensors under either name, without layers that the model has no module
    for, and of the base model alone.

    Args:
        recorded: ``other_tensors``; empty for a checkpoint that has no record, which is not checked.
        in_model: ``other_tensors_in_model``.
        tied: names of tensors that are one in the model.
        as_saved: accept only the names of ``save_pretrained``.

    Raises:
        CheckpointError: naming a tensor that is missing, surplus or altered, or has a name of another saver.
    """
    if not recorded:
        return
    paths = [Path(file) for file in files]
    names = {name for path in paths for name in read_header(path) if not _packed(name)}
    twins = {**tied, **{b: a for a, b in tied.items()}}
    form = next((form for form in _forms(names, recorded, in_model) if _fits(names, form, twins)), None)
    if as_saved and form is not None and names != recorded.keys():
        name = min((names ^ recorded.keys()) & names or recorded.keys() - names)
        raise CheckpointError(
            f"the checkpoint has not the names that save_pretrained gives ({name}), so only transformers can "
            "load it; load the whole model there and save it with save_pretrained"
        )
    # Where no form fits, what differs from the first is what the error is about.
    _compare(paths, recorded if form is None else form, twins)


def _compare(paths: list[Path], form: dict[str, Any], twins: dict[str, str]) -> None:
    """Every tensor against its fingerprint."""
    expected = {**{twins[name]: value for name, value in form.items() if name in twins}, **form}
    found: set[str] = set()
    for path in paths:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if not _packed(name):
                    _check(name, file.get_tensor(name), expected.get(name))
                    found.update((name, twins.get(name, name)))
    missing = form.keys() - found
    if missing:
        raise CheckpointError(f"{', '.join(sorted(missing))} is missing from the checkpoint{_REMEDY}")


def tied_by_record(recorded: dict[str, Any]) -> dict[str, str]:
    """``tied`` of a model that is not there: a head that was not saved was the embeddings."""
    embeddings = [name for name in recorded if name.endswith("embed_tokens.weight")]
    tied = len(embeddings) == 1 and not any(name.endswith("lm_head.weight") for name in recorded)
    return {"lm_head.weight": embeddings[0]} if tied else {}


def _forms(names: set[str], recorded: dict[str, Any], in_model: dict[str, Any]) -> list[dict[str, Any]]:
    """What files with these names may hold, name -> fingerprint; first, what ``save_pretrained`` writes."""
    forms = [recorded]
    if in_model:  # with those tensors without a module that are there
        own = {name: value for name, value in in_model.items() if not is_stand_in(name)}
        optional = {**in_model, **recorded}
        forms.append({**{name: optional[name] for name in names & optional.keys()}, **own})
    bases = []
    for form in forms:
        for prefix in sorted({name.partition(".")[0] + "." for name in form}):
            bases.append({n.removeprefix(prefix): value for n, value in form.items() if n.startswith(prefix)})
    return forms + [base for base in bases if base]


def _fits(names: set[str], form: dict[str, Any], twins: dict[str, str]) -> bool:
    """Whether these are the names of a form, each tied tensor under one of its two names or both."""
    either = names | {twins[name] for name in names if name in twins}
    return form.keys() <= either and all(name in form or twins.get(name) in form for name in names)


def _check(name: str, tensor: Tensor, recorded: str | None) -> None:
    if recorded is None:
        raise CheckpointError(f"{name} is in the checkpoint, but was not when it was written{_REMEDY}")
    if fingerprint(tensor) != recorded:
        raise CheckpointError(
            f"{name} differs from what was written; the checkpoint is damaged or altered{_REMEDY}"
        )


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
