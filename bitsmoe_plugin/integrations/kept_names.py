"""Decoder layers keep the name that they have in a model's files when it is saved.

Rules of transformers match parts of names. One that is meant for another part of a model (``blocks`` of
Kimi's vision tower) renames decoder layers when it is reversed, and no other program would find them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, revert_weight_conversion

from bitsmoe_plugin.models.files import read_header
from bitsmoe_plugin.models.stored_names import StoredNames


class _KeptPrefix(WeightRenaming):
    """A rule of a model's conversions: what decoder layers are called, before a number."""

    __slots__ = ("new", "old")

    def __init__(self, old: str, new: str) -> None:
        super().__init__(source_patterns="^unused$", target_patterns="unused")  # no pattern, see below
        self.old, self.new = old, new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As in transformers."""
        if source_key.startswith(self.old):
            return self.new + source_key[len(self.old) :], source_key
        return source_key, None

    def reverse_transform(self) -> _KeptPrefix:
        """As in transformers."""
        return _KeptPrefix(self.new, self.old)


def stored_prefix(layer: str, names: StoredNames, files: Iterable[str | Path]) -> str | None:
    """What stands before the number of decoder layers in a model's files, with a dot at its end.

    If such a rule had been at work when they were saved, the model's own name for it. None: no tensor of the
    layer is there, by the rules of the model's class.

    Args:
        layer: path of a decoder layer.
        names: of the model's class; not with rules of a key_mapping, which a packed model would need again.
        files: that the model is loaded from.
    """
    for path in (Path(file) for file in files if str(file).endswith(".safetensors")):
        for name in read_header(path):
            target = names.target(name)
            end = target.removeprefix(layer)
            if end != target and name.endswith(end):
                return _unharmed(layer, name.removesuffix(end), end, names)
    return None


def keep_layer_names(model: Any, layer: str, stored: str | None) -> None:
    """Have ``save_pretrained`` write decoder layers by the name that they have in the files.

    Args:
        model: loaded, or on the meta device.
        layer: path of a decoder layer.
        stored: from ``stored_prefix``.
    """
    saved = _saved_prefix(model, layer)
    if stored is None or saved is None or stored.split(".")[-2:] == saved.split(".")[-2:]:
        return  # they differ by no more than what stands before all names
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:  # as transformers takes them for a model that was not loaded
        rules = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    model._weight_conversions = [_KeptPrefix(stored, saved), *rules]  # first here is last when reversed


def _unharmed(layer: str, stored: str, end: str, names: StoredNames) -> str:
    """The prefix with the name of the model's list in it, if that is read as the same."""
    path, _, number = stored.rpartition(".")
    own = layer.split(".")[-2]
    renamed = f"{path.rpartition('.')[0]}.{own}.".lstrip(".")
    return renamed if names.target(f"{renamed}{number}{end}") == layer + end else f"{path}."


def _saved_prefix(model: Any, layer: str) -> str | None:
    """The same in what would be saved."""
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{layer}."):
            continue
        # Of its own shape: some conversions take tensors apart.
        saved = next(iter(revert_weight_conversion(model, {name: torch.empty_like(tensor, device="meta")})))
        end = name.removeprefix(layer)
        if saved.endswith(end):
            return _list_of(saved.removesuffix(end))
    return None


def _list_of(layer: str) -> str:
    return layer.rpartition(".")[0] + "."
