"""What ``save_pretrained`` writes of a model, tried before the work is done that it is to save.

transformers renames tensors on saving, drops tied ones, and refuses some models altogether. All that depends
on names alone, so it can be tried on tensors without data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from bitsmoe_plugin.checkpoint.other_tensors import record
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.integrations.spread_state import in_parts
from bitsmoe_plugin.models.families import MoELayer
from bitsmoe_plugin.models.layer_names import decoder_layer, stored_key
from bitsmoe_plugin.models.stand_ins import is_stand_in, stand_in
from bitsmoe_plugin.models.stored_names import StoredNames
from bitsmoe_plugin.runtime.dense_linear import stored_names

_PROBE = "bitsmoe_payload"
"""All packed tensors of a layer are renamed alike."""


class _CarriedNames(WeightRenaming):
    """A rule of a model's conversions: stored names of tensors that it has no module for, kept as they are.

    Rules of transformers match parts of names, so they would rename some of them on saving.
    """

    __slots__ = ("renamed",)

    def __init__(self, renamed: Mapping[str, str]) -> None:
        """
        Args:
            renamed: name -> the name of ``stand_in`` for it; or the reverse.
        """
        super().__init__(source_patterns="^unused$", target_patterns="unused")  # no pattern, see below
        self.renamed = dict(renamed)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As in transformers. Another rule may have put a prefix before a name that stands for one."""
        key = source_key[max(source_key.find(stand_in("")), 0) :]
        return (self.renamed[key], key) if key in self.renamed else (source_key, None)

    def reverse_transform(self) -> _CarriedNames:
        """As in transformers."""
        return _CarriedNames({new: old for old, new in self.renamed.items()})


def carry(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a model has no module for, for its state dict: saving gives them their names.

    Those that transformers would rename get names that stand for theirs, and the model a rule that says so.

    Args:
        tensors: by their names in the files.
    """
    rules = getattr(model, "_weight_conversions", None)
    if rules is not None:  # None: those of the class
        rules = model._weight_conversions = [rule for rule in rules if not isinstance(rule, _CarriedNames)]
    empty = {name: _empty(tensor) for name, tensor in tensors.items()}
    kept = revert_weight_conversion(model, dict(empty))
    changed = [name for name, tensor in empty.items() if kept.get(name) is not tensor]
    renamed = {name: stand_in(name) for name in changed}
    if renamed:  # first here is last when names are reverted
        model._weight_conversions = [_CarriedNames(renamed), *(rules or ())]
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def records(model: Any, state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """``other_tensors`` and ``other_tensors_in_model`` of a model that is about to be saved.

    Args:
        state: of the model, with what ``carry`` adds.

    Returns:
        name -> fingerprint as ``save_pretrained`` names them, and as the model does; of those the second is
        empty if it says nothing new.
    """
    own = _own_tensors(model, state)
    saved: dict[str, str] = {}
    in_model: dict[str, str] = {}
    for part in in_parts(model, own):
        saved |= record(revert_weight_conversion(model, dict(part)))
        in_model |= record(part)
    names = model.state_dict().keys() | stored_names(model)
    in_model = {name: value for name, value in in_model.items() if name in names or is_stand_in(name)}
    return saved, ({} if in_model == saved else in_model)


def _own_tensors(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a state dict that are saved: tied ones once."""
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    return dict(remove_tied_weights_from_state_dict(kept, model))


def check_save(model: Any, layers: Sequence[MoELayer], carried: Mapping[str, Tensor]) -> None:
    """Refuse a model that could be quantized, but not be saved or not be found again in what is saved.

    Args:
        model: loaded, its experts not quantized yet.
        layers: with experts.
        carried: what it has no module for, by their names in the files; of any data.

    Raises:
        QuantizationError: naming the reason.
    """
    try:
        state = _own_tensors(model, model.state_dict())
        experts = tuple(f"{layer.name}." for layer in layers)
        planned = {name: _empty(tensor) for name, tensor in state.items() if not name.startswith(experts)}
        packed = {f"{layer.name}.{_PROBE}": torch.empty(1, device="meta") for layer in layers}
        others = carry(model, {name: _empty(tensor) for name, tensor in carried.items()})
        saved = revert_weight_conversion(model, {**planned, **packed, **others})
        _try_configs(model)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise QuantizationError(
            f"transformers cannot save this model, so it is not quantized: {' '.join(str(error).split())}"
        ) from error
    found = {id(tensor): name for name, tensor in saved.items()}
    for name, tensor in packed.items():
        _check_packed_name(name, found.get(id(tensor), ""))
    _check_found_again(model, saved.keys() - {found.get(id(t)) for t in packed.values()} - carried.keys())
    lost = sorted(carried.keys() - saved.keys())
    if lost:
        raise QuantizationError(
            f"{', '.join(lost[:3])} would get other names on saving; remove such tensors from a copy of the "
            "model's files first"
        )


def _check_found_again(model: Any, saved: Iterable[str]) -> None:
    """Refuse names that are read by the rules of a key_mapping alone."""
    names = StoredNames(model)
    names.use_rules_of_class(model)
    lost = sorted(n for n in saved if not names.holds(names.target(n)) and not names.is_ignored(n))
    if lost:
        raise QuantizationError(_not_found_again("a tensor", lost[0]))


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _check_packed_name(name: str, saved: str) -> None:
    wanted = (decoder_layer(name.rpartition(".")[0]), _PROBE)
    if stored_key(saved) != wanted:
        raise QuantizationError(_not_found_again(name, saved or "nothing"))


def _not_found_again(name: str, saved: str) -> str:
    return (
        f"{name} would be saved as {saved}, where it would not be found again without what renamed it "
        "(key_mapping?); save the model under transformers' own names first (save_original_format=False) and "
        "quantize that"
    )


def _try_configs(model: Any) -> None:
    """Save all that is small. A full disk says nothing about the model."""
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
