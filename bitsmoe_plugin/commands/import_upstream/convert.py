"""Convert a checkpoint of the method's authors, layer by layer: ``bitsmoe import-upstream``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from bitsmoe_plugin.base.atomic_output import check_output_directory, publish
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.work_directory import OUTPUT, has_progress, staging, writing
from bitsmoe_plugin.checkpoint.manifest import layer_manifest
from bitsmoe_plugin.checkpoint.other_tensors import record
from bitsmoe_plugin.codec import row_codec
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.codec.tiled import TILE
from bitsmoe_plugin.commands.import_upstream.files import INDEX, UpstreamFiles, assign
from bitsmoe_plugin.commands.import_upstream.layer import ConvertedLayer, convert_layer
from bitsmoe_plugin.commands.import_upstream.rows import GROUP
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError, QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers, layer_shape
from bitsmoe_plugin.models.json_objects import read_object
from bitsmoe_plugin.models.model_class import auto_class
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.side_files import copy_side_files, side_files
from bitsmoe_plugin.presets import ALL_WIDTHS

FILE_BYTES = 2**30
"""Tensors outside the MoE layers are written in files of about this size."""
_TAGS = ("bitsmoe", "bitsmoe_model_type", "bitsmoe_vllm", "auto_map")


@known_state()
def import_upstream(source: Path, out: Path) -> None:
    """Convert the checkpoint in ``source`` to ``out``, which then loads like one of our own.

    Memory is bounded by one layer. ``out`` takes its name at the end, so it is either absent or complete;
    until then all is in ``out`` with ".work" appended, without a config, so that it does not load.

    Raises:
        CheckpointError: ``source`` is no such checkpoint, or contradicts the format (see the package).
        QuantizationError: ``out`` exists or cannot be written, or its work directory is in use or holds
            other work.
    """
    out = Path(out).resolve()
    check_output_directory(out)
    config = read_base_config(source)
    work = out.with_name(f"{out.name}.work")
    with staging(work):
        if has_progress(work):
            raise QuantizationError(
                f"work directory {work} holds layers that bitsmoe quantize has finished; choose another name"
            )
        partial = work / OUTPUT
        with writing(partial):
            if partial.exists():  # of a run that was killed
                shutil.rmtree(partial)
            partial.mkdir()
        _convert(source, config, partial)
        with writing(out):
            publish(partial, out)


def read_base_config(source: Path) -> dict[str, Any]:
    """config.json of the base model, without what marks it as converted by the authors.

    Raises:
        CheckpointError: it lacks the mark, or is of a model that the authors' code does not run.
    """
    path = Path(source) / "config.json"
    values = read_object(path)
    tagged = values.get("bitsmoe")
    if tagged is not True or "quantization_config" in values:
        raise CheckpointError(
            f"{source} is no checkpoint of the BitsMoE authors: config.json has bitsmoe={tagged!r}"
            + (" and a quantization_config" if "quantization_config" in values else "")
        )
    family, activation = values.get("model_type"), values.get("hidden_act", "silu")
    if family not in CONFIG_MAPPING or activation != "silu":
        raise CheckpointError(
            f"{path}: model_type {family!r} with hidden_act {activation!r} is not supported; the format has "
            "SiLU experts, of a model that transformers knows"
        )
    return {key: value for key, value in values.items() if key not in _TAGS}


def expert_shapes(config: dict[str, Any]) -> dict[str, LayerShape]:
    """Name of each experts module -> its sizes.

    Raises:
        QuantizationError: the model has no MoE layers, or of another convention.
        CheckpointError: experts without a gate, or neurons that do not fill groups of 32.
    """
    base = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        layers = find_moe_layers(auto_class(base).from_config(base))
    shapes = {layer.name: layer_shape(layer.module) for layer in layers}
    for name, shape in shapes.items():
        if not shape.has_gate:
            raise CheckpointError(f"{name}: experts without a gate, which the format does not know")
        if shape.intermediate_size % GROUP:
            raise CheckpointError(
                f"{name}: intermediate_size {shape.intermediate_size} is no multiple of {GROUP}, as the "
                "format asks"
            )
    return shapes


@dataclass
class _Manifest:
    """What is known of the files that are written."""

    directory: Path
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    files: list[dict[str, int]] = field(default_factory=list)
    basis_bits: set[int] = field(default_factory=set)
    expert_bits: int = 0

    def add_layer(self, name: str, shape: LayerShape, layer: ConvertedLayer) -> dict[str, Tensor]:
        """Note a layer; returns its tensors by the names that they are written by."""
        self.layers[name] = layer_manifest(shape, layer.packed, layer.dtype, layer.kept)
        if layer.kept:
            self.kept[name] = list(layer.kept)
        self.basis_bits.add(layer.basis_bits)
        if len(self.basis_bits) > 1:
            raise CheckpointError(f"{name} has bases of {layer.basis_bits} bits, layers before it others")
        self.expert_bits += layer.packed.stored_bits()
        return {f"{name}.{buffer}": tensor for buffer, tensor in layer.packed.tensors()}

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write one file, and note what is not packed."""
        self.others.update(record(tensors))
        self.files.append({name: tensor.nbytes for name, tensor in tensors.items()})
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with writing(self.directory):
            save_file(whole, self.directory / f"{len(self.files)}.part", metadata={"format": "pt"})


def _convert(source: Path, config: dict[str, Any], partial: Path) -> None:
    """Write everything; the config last, because it is what makes a checkpoint of the rest."""
    shapes = expert_shapes(config)
    manifest = _Manifest(directory=partial)
    with UpstreamFiles.open(source) as files:
        layers, others = assign(files, {name: shape.num_experts for name, shape in shapes.items()})
        for layer in logging.tqdm(layers, desc="Converting layers"):
            converted = convert_layer(files, layer, shapes[layer.name])
            manifest.write(manifest.add_layer(layer.name, shapes[layer.name], converted))
        for names in _batches(files, others):
            manifest.write({name: files.read(name) for name in names})
    weights = sum(shape.weights for shape in shapes.values())
    with writing(partial):
        _name_files(manifest)
        copy_side_files(side_files(ModelSource(name=str(source))), partial, replace=True)
        config["quantization_config"] = _quantization_config(manifest, weights).to_dict()
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _batches(files: UpstreamFiles, names: list[str]) -> Iterator[list[str]]:
    """Names of tensors that are read and written together."""
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += files.read(name).nbytes  # mapped, not read
        if size >= FILE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _name_files(manifest: _Manifest) -> None:
    """Give the files their final names, and write the index."""
    total, where = len(manifest.files), {}
    for i, tensors in enumerate(manifest.files, start=1):
        name = f"model-{i:05}-of-{total:05}.safetensors"
        (manifest.directory / f"{i}.part").rename(manifest.directory / name)
        where.update(dict.fromkeys(tensors, name))
    size = sum(sum(tensors.values()) for tensors in manifest.files)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (manifest.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _quantization_config(manifest: _Manifest, weights: int) -> BitsMoEConfig:
    (basis_bits,) = manifest.basis_bits
    return BitsMoEConfig(
        # The size that there is; of tiny models more than a quantizer would be asked for.
        bits=min(16.0, round(manifest.expert_bits / weights, 4)),
        method="paper-v1" if basis_bits == 16 else "paper-v2",
        widths=ALL_WIDTHS,
        grid=row_codec.TILED,
        basis_bits=basis_bits,
        basis_group_size=TILE,
        super_experts=manifest.kept,
        layers=manifest.layers,
        calibration={"imported": "checkpoint of the BitsMoE authors"},
        other_tensors=manifest.others,
    )
