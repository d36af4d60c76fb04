"""Which tensors of the authors' files belong to which layer; found by name, before any is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitsmoe_plugin.codec.layout import FACTORS
from bitsmoe_plugin.commands.import_upstream import bases, rows
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import INDEX, SINGLE, check_place, open_tensors, tensor_files, weight_map

_PACKED = {f"{factor}_{buffer}" for factor in FACTORS for buffer in (*rows.REQUIRED, *rows.IMPLIED)}
_NEEDED = [f"{factor}_{buffer}" for factor in FACTORS for buffer in rows.REQUIRED]
_DENSE = [f"{factor}_proj.weight" for factor in FACTORS]
_OURS = re.compile(
    rf"\.(?:{'|'.join(bases.NAMES)})(?:_\w+)?$|\.experts\.\d+\.(?:{'|'.join(sorted(_PACKED))})$"
)


@dataclass(frozen=True)
class UpstreamFiles:
    """The open safetensors files of a checkpoint; tensors are mapped when they are read.

    Attributes:
        directory: of the checkpoint.
        files: tensor name -> open file.
    """

    directory: Path
    files: dict[str, Any]

    @classmethod
    @contextmanager
    def open(cls, directory: Path) -> Iterator[UpstreamFiles]:
        """
        Raises:
            CheckpointError: a file is missing or damaged, or a name stands in two of them.
        """
        found: dict[str, Any] = {}
        with ExitStack() as stack:
            paths = _paths(directory)
            tensor_files(paths)  # it refuses names that stand twice
            for path in paths:
                file = stack.enter_context(open_tensors(path))
                found |= dict.fromkeys(file.keys(), file)
            yield cls(directory, found)

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self.files[name].get_tensor(name)

    def empty(self, name: str) -> bool:
        """Whether a tensor has no values, from the header alone."""
        return 0 in self.files[name].get_slice(name).get_shape()


def _paths(directory: Path) -> list[Path]:
    index = directory / INDEX
    names = set(weight_map(index).values()) if index.is_file() else {SINGLE}
    for name in names:
        check_place(directory / name, directory)
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks {name}; only safetensors files are converted")
    return [directory / name for name in sorted(names)]


@dataclass(frozen=True)
class LayerTensors:
    """Names of the tensors of one MoE layer.

    Attributes:
        name: of the experts module, ``<moe>.experts``.
        bases: basis -> "" or a member of ``bases.PARTS`` -> tensor.
        packed: expert -> ``<p>_<buffer>`` -> tensor.
        dense: expert -> ``<p>_proj.weight`` -> tensor, of the experts that are not packed.
    """

    name: str
    bases: dict[str, dict[str, str]]
    packed: dict[int, dict[str, str]]
    dense: dict[int, dict[str, str]]


def assign(files: UpstreamFiles, layers: dict[str, int]) -> tuple[list[LayerTensors], list[str]]:
    """Find the tensors of every MoE layer, and those that belong to none.

    Args:
        layers: name of each experts module -> number of experts.

    Raises:
        CheckpointError: naming a tensor that is missing, surplus or of no MoE layer.
    """
    by_layer: dict[str, list[str]] = {name: [] for name in layers}
    others: list[str] = []
    prefixes = {name.removesuffix("experts"): name for name in layers}
    for name in sorted(files.files):
        owner = _owner(name, prefixes)
        if owner is None and _OURS.search(name):
            raise CheckpointError(f"{name} belongs to no MoE layer of the model")
        (others if owner is None else by_layer[owner]).append(name)
    return [_layer(files, name, by_layer[name], layers[name]) for name in layers], others


def _owner(name: str, prefixes: dict[str, str]) -> str | None:
    """Layer of a tensor of the experts or bases."""
    match = re.match(r"(.*\.)(?:experts\.|shared_(?:vh|u)_)", name)
    return prefixes.get(match[1]) if match else None


def _layer(files: UpstreamFiles, layer: str, names: Iterable[str], experts: int) -> LayerTensors:
    packed: dict[int, dict[str, str]] = {}
    dense: dict[int, dict[str, str]] = {}
    shared: dict[str, str] = {}
    for name in names:
        match = re.fullmatch(rf"{re.escape(layer)}\.(\d+)\.(.+)", name)
        if match is None:
            shared[name.rpartition(".")[2]] = name
            continue
        expert, leaf = int(match[1]), match[2]
        if expert >= experts or leaf not in (*_PACKED, *_DENSE):
            raise CheckpointError(f"{name} is no tensor of the format, for {experts} experts")
        (packed if leaf in _PACKED else dense).setdefault(expert, {})[leaf] = name
    for expert in range(experts):
        if expert in packed and expert in dense:
            raise CheckpointError(f"{layer}.{expert} is both packed and unpacked")
        found, needed = (dense[expert], _DENSE) if expert in dense else (packed.get(expert, {}), _NEEDED)
        for leaf in needed:
            if leaf not in found:
                raise CheckpointError(f"{layer}.{expert}.{leaf} is missing")
    return LayerTensors(layer, _bases(files, layer.removesuffix("experts"), shared), packed, dense)


def _bases(files: UpstreamFiles, prefix: str, shared: dict[str, str]) -> dict[str, dict[str, str]]:
    """The tensors of each basis; both kinds at once are refused, but for empty ones of the release."""
    found = {}
    for basis in bases.NAMES:
        marlin = {part: shared.pop(f"{basis}_{part}") for part in bases.PARTS if f"{basis}_{part}" in shared}
        half = shared.pop(basis, None)
        if half is not None and marlin and files.empty(half):
            half = None
        if half is not None and marlin:
            raise CheckpointError(f"{half} is stored in 16 and in 8 bits")
        if half is None and len(marlin) < len(bases.PARTS):
            missing = next(f"_{part}" for part in bases.PARTS if part not in marlin) if marlin else ""
            raise CheckpointError(f"{prefix}{basis}{missing} is missing")
        found[basis] = marlin if half is None else {"": half}
    if shared:
        raise CheckpointError(f"{next(iter(shared.values()))} is no tensor of the format")
    if len({"" in tensors for tensors in found.values()}) > 1:
        raise CheckpointError(f"{prefix}: some bases are stored in 16 bits and some in 8")
    return found
