"""What a layer's packed tensors do not say of it, as text that a compiled or exported graph carries."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.codec import layout, row_codec
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.models import gating as gating_functions
from bitsmoe_plugin.models.families import apply_gating, layout_of
from bitsmoe_plugin.models.gating import Gating

_WIDTHS = (0, 1, 2, 3, 4, 6, 8, 16)
_LARGEST = 2**18


@dataclass(frozen=True)
class LayerKind:
    """Attributes:
    spec: sizes; lengths that differ between layers are 0, the tensors have them.
    gating: a name for ``gating_of``.
    takes_copies: see ``families.Layout``.
    """

    spec: PackedSpec
    gating: str
    takes_copies: bool

    @classmethod
    def describe(cls, spec: PackedSpec, module: nn.Module) -> LayerKind:
        """Of a layer that replaces ``module``."""
        fixed = replace(spec, payload_words=0, stored_rows=0)
        return cls(fixed, gating_name(module), layout_of(module).takes_copies)

    def text(self) -> str:
        """What ``parse`` reads."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> LayerKind:
        """From text, which may come from a file.

        Raises:
            CheckpointError: it is not what ``text`` wrote.
        """
        try:
            values = json.loads(text)
            spec = values["spec"]
            shape = LayerShape(**spec.pop("shape"))
            lists: dict[str, Any] = {name: tuple(spec.pop(name)) for name in ("widths", "kept")}
            kind = LayerKind(
                PackedSpec(shape=shape, **lists, **spec), values["gating"], values["takes_copies"]
            )
            sensible = _is_sensible(kind)
        except (ValueError, TypeError, KeyError, AttributeError):
            sensible = False
        if not sensible:
            raise CheckpointError(f"{text[:200]!r} does not describe packed experts; the graph was altered")
        return kind

    def bind(self, tensors: Sequence[Tensor]) -> tuple[PackedSpec, PackedExperts]:
        """The spec of a layer of this kind, and its tensors by name.

        Args:
            tensors: in the order of ``PackedSpec.tensors``.

        Raises:
            CheckpointError: there are more or fewer tensors than such a layer has.
        """
        names = [name.removeprefix("bitsmoe_") for name in self.spec.tensors()]
        if len(names) != len(tensors):
            raise CheckpointError(f"{len(tensors)} packed tensors are given, the layer has {len(names)}")
        packed = PackedExperts(**dict(zip(names, tensors, strict=True)))
        rows = 0 if packed.row_gains is None else packed.row_gains.numel()
        return replace(self.spec, payload_words=packed.payload.numel(), stored_rows=rows), packed


def _is_sensible(kind: LayerKind) -> bool:
    spec, shape = kind.spec, kind.spec.shape
    sizes = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
    numbers = (*sizes, spec.basis_bits, spec.basis_group_size, spec.input_bases)
    if type(shape.has_gate) is not bool or spec.input_bases > shape.inputs:
        return False
    if not all(type(n) is int and 0 < n <= _LARGEST for n in (*numbers, *(e + 1 for e in spec.kept))):
        return False
    return (
        0 < len(spec.widths) <= len(_WIDTHS)
        and all(type(w) is int and w in _WIDTHS for w in spec.widths)
        and list(spec.widths) == sorted(set(spec.widths))
        and max(spec.widths) > 0
        and spec.basis_bits in (4, 8, 16)
        and spec.basis_group_size in (16, 32, 64, 128, 256)
        and (spec.basis_bits == 16 or shape.hidden_size % spec.basis_group_size == 0)
        and spec.input_bases in (1, 2)
        and spec.grid in (*row_codec.GRIDS, row_codec.TILED)
        and list(spec.kept) == sorted(set(spec.kept))
        and all(expert < shape.num_experts for expert in spec.kept)
        and spec.original_dtype in layout.ORIGINAL_DTYPES
        and spec.payload_words == spec.stored_rows == 0
        and all(type(flag) is bool for flag in (spec.has_bias, kind.takes_copies))
        and isinstance(kind.gating, str)
    )


@dataclass(frozen=True)
class _OwnGating:
    owner: type[nn.Module]
    values: Tensor
    gating: Gating


_OWN: list[_OwnGating] = []
"""Gatings that have no ``GatingForm``, one for each that computes something else."""


def gating_name(module: nn.Module) -> str:
    """A name for the gating of an experts module: its form, or one that this process alone knows."""
    gating, has_gate = partial(apply_gating, module), layout_of(module).has_gate
    form = gating_functions.form_of(gating, has_gate)
    if form is not None:
        return form.text()
    values = gating(*gating_functions.probe(has_gate))
    for number, known in enumerate(_OWN):
        if known.owner is type(module) and torch.equal(known.values, values):
            return f"{type(module).__name__}#{number}"
    bare: Any = copy.copy(module)
    bare._parameters = {}  # gating needs none of them
    _OWN.append(_OwnGating(type(module), values, partial(apply_gating, bare)))
    return f"{type(module).__name__}#{len(_OWN) - 1}"


def gating_of(name: str) -> Gating:
    """The gating of a name.

    Raises:
        ConfigError: it is that of a module of another process.
    """
    owner, mark, number = name.partition("#")
    if not mark:
        return gating_functions.gating(name)
    if number.isdecimal() and int(number) < len(_OWN) and _OWN[int(number)].owner.__name__ == owner:
        return _OWN[int(number)].gating
    raise ConfigError(
        f"this graph holds experts of {owner}, whose gating only the process that made the graph knows; "
        "load the packed model and export or trace it in this process"
    )
