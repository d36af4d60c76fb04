"""Names of stored tensors against those of the model that transformers loads them into."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from bitsmoe_plugin.models.files import read_header
from bitsmoe_plugin.models.layer_names import PREDICTION
from bitsmoe_plugin.models.stand_ins import is_stand_in, stood_for

if TYPE_CHECKING:
    from bitsmoe_plugin.models.low_precision import LowPrecision

_FAMILIAR = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Buffers of old releases, which transformers makes by itself and leaves out without a word."""


class StoredNames:
    """What becomes of the tensors of a checkpoint in a model.

    Attributes:
        modules: paths of the model's modules, without its own.
    """

    def __init__(self, model: Any, precision: LowPrecision | None = None) -> None:
        """
        Args:
            model: of transformers, with its experts; on the meta device or loaded.
            precision: how the checkpoint is stored, if it is in low precision.
        """
        self._precision = precision
        self._known = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
        # The loader asks such a dict with get(), so values must not be false.
        self._names = dict.fromkeys(self._known, True)
        self._prefix = model.base_model_prefix
        self._ignored = tuple(model._keys_to_ignore_on_load_unexpected or ())
        self._places = {_place(name) for name in self._known}
        self.modules = {name for name, _ in model.named_modules()} - {""}
        self.use_rules_of(model)

    def use_rules_of(self, model: Any) -> None:
        """Take the rules that a model was loaded by, also those of a key_mapping; before, its class's."""
        rules = getattr(model, "_weight_conversions", None)
        if rules is None:
            rules = get_model_conversion_mapping(model)
            rules = rules if self._precision is None else self._precision.conversions(rules, model)
        self._use(rules)

    def use_rules_of_class(self, model: Any) -> None:
        """Take the rules that a model's class has by itself, whatever key_mapping it was loaded with."""
        self._use(get_model_conversion_mapping(model))

    def _use(self, rules: Iterable[Any]) -> None:
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._targets: dict[str, tuple[str, str | None]] = {}

    def _rename(self, name: str) -> tuple[str, str | None]:
        if name not in self._targets:
            self._targets[name] = self._apply_rules(name)
        return self._targets[name]

    def _apply_rules(self, name: str) -> tuple[str, str | None]:
        found = rename_source_key(name, self._renamings, self._converters, self._prefix, self._names)
        if found[0] not in self._known and name in self._known:  # as in transformers: better not renamed
            return rename_source_key(name, [], [], self._prefix, self._names)
        return found

    def target(self, name: str) -> str:
        """What a stored tensor is, or becomes part of, in the model, if that has it."""
        return self._rename(name)[0]

    def holds(self, target: str) -> bool:
        """Whether the model has a tensor of this name."""
        return target in self._known

    def is_floating(self, target: str) -> bool:
        """Whether the model computes with it in floating point."""
        return self._known[target]

    def is_decoded(self, name: str) -> bool:
        """Whether the family's own conversion makes weights of what is stored in low precision."""
        pattern = self._rename(name)[1]
        return any(
            "Dequantize" in type(operation).__name__
            for converter in self._converters
            if pattern in converter.source_patterns
            for operation in converter.operations
        )

    def _is_declared(self, name: str) -> bool:
        """Whether the model class declares that it leaves the tensor out."""
        return any(
            re.search(pattern, name) or re.search(pattern, self.target(name)) for pattern in self._ignored
        )

    def is_ignored(self, name: str) -> bool:
        """Whether transformers leaves the tensor out without a word."""
        return _FAMILIAR.search(name) is not None or self._is_declared(name)

    def is_prediction_layer(self, name: str) -> bool:
        """Whether the tensor is of a layer for multi-token prediction, which the model has no module for.

        Their names say so, or they are numbered like decoder layers beyond the last. What else a class
        leaves out belongs to other parts of a larger model, such as ``model.visual``.
        """
        target = self.target(name)
        if target in self._known or _FAMILIAR.search(name):
            return False
        place = _place(target)
        beyond = place not in self._places and re.sub(r"\d+\.$", "0.", place) in self._places
        return beyond or is_stand_in(name) or PREDICTION.search(name) is not None

    def is_carried(self, name: str) -> bool:
        """Whether the tensor goes into the packed checkpoint as it is: transformers does not load it, and
        other programs ask for it."""
        return self.is_prediction_layer(name) or self._is_spare(name)

    def _is_spare(self, name: str) -> bool:
        """Whether the tensor is of a decoder layer that the model has, whose class declares that it computes
        without it (the norms behind dense layers of A.X-K1, which vLLM makes)."""
        target = self.target(name)
        if target in self._known or _FAMILIAR.search(name) or not self._is_declared(name):
            return False
        place = _place(target)
        return place in self._places and place.rstrip(".").rpartition(".")[2].isdecimal()

    def is_left_out(self, name: str) -> bool:
        """Whether the tensor is of a part of a larger model that this class does not have."""
        target = self.target(name)
        first, *rest = target.split(".")
        part = f"{first}.{rest[0]}" if first == self._prefix and len(rest) > 1 else first
        known = target in self._known or part in self.modules or _FAMILIAR.search(name)
        return not known and not self.is_carried(name)


def without_module(
    names: StoredNames, files: Iterable[str | Path]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Tensors of a checkpoint that the model's class leaves out without a word.

    Args:
        names: of the model's class.
        files: of the checkpoint; others than safetensors are passed over.

    Returns:
        name -> (file, stored name) of those that go into the packed checkpoint (see
        ``StoredNames.is_carried``), and names of those that are of parts which this class lacks.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    carried: dict[str, tuple[str, str]] = {}
    left_out = []
    for path in (str(file) for file in files if str(file).endswith(".safetensors")):
        for name in read_header(Path(path)):
            if names.is_carried(name):
                carried[stood_for(name)] = path, name
            elif names.is_left_out(name):
                left_out.append(name)
    return carried, left_out


def describe_left_out(model: str, names: list[str]) -> str:
    """What a user must know of the parts that a model's class lacks.

    Args:
        model: name of the class.
        names: from ``without_module``.
    """
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    return (
        f"{', '.join(parts)} ({len(names)} tensors) in the model's files are no part of {model} and will not "
        "be in the packed model; to keep them, load it with the class that config.json names "
        "(AutoModelForMultimodalLM of a multimodal one)"
    )


def _place(name: str) -> str:
    """A name up to its first number, or to its first dot if it has none."""
    match = re.match(r".*?\.\d+\.", name) or re.match(r"[^.]*\.", name)
    return match[0] if match else name
