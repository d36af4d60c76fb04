"""``bitsmoe dequantize``: a packed checkpoint as the dense one of its class, which every tool can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from bitsmoe_plugin.base.atomic_output import check_output_directory, publish
from bitsmoe_plugin.base.work_directory import OUTPUT, staging, writing
from bitsmoe_plugin.checkpoint.manifest import check_shape
from bitsmoe_plugin.checkpoint.other_tensors import tied_by_record, verify_others
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.codec.dense import SCALE
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.integrations.kept_names import keep_layer_names, stored_prefix
from bitsmoe_plugin.integrations.packed_loading import stored_names
from bitsmoe_plugin.models.families import MoELayer, find_moe_layers, fused_parameters
from bitsmoe_plugin.models.files import INDEX, SINGLE, open_tensors, safetensors_files
from bitsmoe_plugin.models.json_objects import read_object
from bitsmoe_plugin.models.model_class import auto_class
from bitsmoe_plugin.models.model_config import load_config
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.side_files import copy_side_files, side_files
from bitsmoe_plugin.models.stored_names import StoredNames
from bitsmoe_plugin.runtime.decoding import decode_biases, decode_weights
from bitsmoe_plugin.runtime.dense_linear import read_weight

DTYPES = ("bfloat16", "float16", "float32")
FILE_BYTES = 2**32
"""Files are written once they have this size, or with a single larger layer."""


def dequantize_checkpoint(source: Path, out: Path, dtype: str | None = None) -> None:
    """Write the dense model that a packed checkpoint stands for, with its tokenizer and other small files.

    Memory is bounded by ``FILE_BYTES`` and one dense layer. ``out`` takes its name at the end, so it is
    either absent or complete. Tensors that are not packed are copied, also those that transformers does not
    use.

    Args:
        source: directory of a packed checkpoint.
        out: directory that does not exist or is empty.
        dtype: one of ``DTYPES``, of the experts and of all tensors that are of the model's dtype; None: the
            model's.

    Raises:
        CheckpointError: ``source`` is no packed checkpoint, or damaged.
        ConfigError: an unknown ``dtype``.
        QuantizationError: ``out`` exists or cannot be written.
    """
    source, out = Path(source), Path(out).resolve()
    check_output_directory(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    manifest = read_config(source)
    files = safetensors_files(source)
    packed = PackedFiles.open(files, manifest)
    recorded = manifest.other_tensors
    verify_others(files, recorded, manifest.other_tensors_in_model, tied_by_record(recorded))
    conversion = _Conversion.plan(source, packed, dtype)
    beside_weights = side_files(ModelSource(name=str(source)))
    work = out.with_name(f"{out.name}.work")
    with staging(work), writing(out):
        partial = work / OUTPUT
        if partial.exists():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir()
        shards = _Shards(partial)
        for tensors in conversion.tensors(files):
            shards.add(tensors)
        shards.finish()
        copy_side_files(beside_weights, partial)
        text = json.dumps(conversion.config, indent=2) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        publish(partial, out)


@dataclass(frozen=True)
class _Conversion:
    """What becomes of a packed checkpoint.

    Attributes:
        model: of the checkpoint's class, on the meta device.
        layers: name in the manifest -> experts of the model.
        packed: the layers in the files.
        former, dtype: of the model before and after.
        config: config.json of the result.
    """

    model: Any
    layers: dict[str, MoELayer]
    packed: PackedFiles
    former: torch.dtype
    dtype: torch.dtype
    config: dict[str, Any]

    @classmethod
    def plan(cls, source: Path, packed: PackedFiles, dtype: str | None) -> _Conversion:
        """Match the model's layers with the manifest's; reads no tensor."""
        config = read_object(source / "config.json")
        del config["quantization_config"]
        model, former = _empty_model(source)
        layers = {layer.name: layer for layer in find_moe_layers(model)}
        first = next(iter(layers.values())).layer_name
        keep_layer_names(model, first, stored_prefix(first, StoredNames(model), safetensors_files(source)))
        stored = stored_names(list(layers), packed.config)
        if len(stored) != len(layers) or set(stored.values()) != set(packed.specs):
            raise CheckpointError(
                f"{source}: quantization_config has {', '.join(sorted(packed.specs))}, but the model of "
                f"config.json has experts in {', '.join(sorted(layers))}; config.json was altered"
            )
        for name, layer in layers.items():
            check_shape(name, packed.specs[stored[name]], layer.module)
        text = config.get("text_config")
        for part in (config, text if isinstance(text, dict) else {}):
            part.update({key: dtype for key in ("dtype", "torch_dtype") if dtype is not None and key in part})
        found = {stored[name]: layer for name, layer in layers.items()}
        return cls(model, found, packed, former, getattr(torch, dtype) if dtype else former, config)

    def tensors(self, files: list[Path]) -> Iterator[dict[str, Tensor]]:
        """By the names that they are saved by: those that are not packed, one by one, then layer by layer."""
        stored = {f"{layer.name}.{part}" for layer in self.packed.dense for part in layer.files}
        for path in files:
            with open_tensors(path) as file:
                for name in sorted(file.keys()):
                    if ".bitsmoe_" not in name and name not in stored:
                        yield {name: self._converted(file.get_tensor(name))}
        for layer in self.packed.dense:
            parts = layer.read()  # rounded once: in the dtype of the model, as loading does
            parts[SCALE] = self._converted(parts[SCALE])
            yield {f"{layer.name}.weight": read_weight(layer.name, parts, layer.scheme)}
        for name in logging.tqdm(self.layers, desc="Dequantizing layers"):
            yield self._layer(name)

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.dtype == self.former else tensor

    def _layer(self, name: str) -> dict[str, Tensor]:
        layer, spec, packed = self.layers[name], self.packed.specs[name], self.packed.read(name)
        fused = fused_parameters(
            layer.module, decode_weights(spec, packed, self.dtype), decode_biases(spec, packed, self.dtype)
        )
        state = {f"{layer.name}.{parameter}": tensor for parameter, tensor in fused.items()}
        saved: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return saved


def _empty_model(source: Path) -> tuple[Any, torch.dtype]:
    """The model that config.json describes, on the meta device, and its dtype.

    Raises:
        CheckpointError: none can be made, or it says no dtype.
    """
    config = load_config(source)
    named = getattr(transformers, str((config.architectures or [""])[0]), None)
    kind = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else None
    dtype = config.dtype or config.get_text_config().dtype
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{source / 'config.json'} has no dtype; write the one of the model into it")
    try:
        with torch.device("meta"):
            return (kind._from_config(config) if kind else auto_class(config).from_config(config)), dtype
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"config.json describes no model that can be made ({error})") from error


@dataclass
class _Shards:
    """Files of tensors, written when they are full and named when it is known how many there are."""

    directory: Path
    waiting: dict[str, Tensor] = field(default_factory=dict)
    written: list[dict[str, int]] = field(default_factory=list)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors that come into one file.

        Raises:
            CheckpointError: a name was there before.
        """
        taken = {*self.waiting}.union(*self.written)
        twice = [name for name in tensors if name in taken]
        if twice:
            raise CheckpointError(f"{twice[0]} would be written twice; the checkpoint holds it unpacked too")
        size = sum(tensor.nbytes for tensor in (*self.waiting.values(), *tensors.values()))
        if self.waiting and size > FILE_BYTES:
            self._write()
        self.waiting.update(tensors)

    def _write(self) -> None:
        whole = {name: tensor.contiguous() for name, tensor in self.waiting.items()}
        self.written.append({name: tensor.nbytes for name, tensor in whole.items()})
        save_file(whole, self.directory / f"{len(self.written)}.part", metadata={"format": "pt"})
        self.waiting = {}

    def finish(self) -> None:
        """Write what waits, name the files, and write an index if there are several."""
        self._write()
        total, where = len(self.written), {}
        for number, tensors in enumerate(self.written, start=1):
            name = SINGLE if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"
            (self.directory / f"{number}.part").rename(self.directory / name)
            where.update(dict.fromkeys(tensors, name))
        if total > 1:
            size = sum(sum(tensors.values()) for tensors in self.written)
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n"
            (self.directory / INDEX).write_text(text, encoding="utf-8")
