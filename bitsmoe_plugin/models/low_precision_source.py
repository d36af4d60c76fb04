"""A checkpoint in low precision beside the model that is to be loaded from it: is it whole, how it grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bitsmoe_plugin.base.sizes import readable_size
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.models.files import INDEX, SINGLE, weight_map
from bitsmoe_plugin.models.json_objects import read_object
from bitsmoe_plugin.models.low_precision import FUSED, LowPrecision
from bitsmoe_plugin.models.low_precision_checks import check_finite, check_stored
from bitsmoe_plugin.models.low_precision_decode import is_weight
from bitsmoe_plugin.models.source_tensors import check_source, folder_dtypes
from bitsmoe_plugin.models.stored_names import StoredNames
from bitsmoe_plugin.models.stored_tensors import StoredTensor, read_headers


class LowPrecisionSource:
    """Attributes:
    precision: how it is stored.
    names: of its tensors in the model.
    expert_bytes: of routed experts, as they are stored.
    other_bytes: of all that is no routed expert, as it is stored.
    grown_bytes: of the same, as it will be.
    """

    def __init__(self, model: Any, settings: Mapping[str, Any], files: Sequence[str | Path]) -> None:
        """
        Args:
            model: not loaded, with its experts.
            settings: ``quantization_config`` of the checkpoint.
            files: of the checkpoint; their headers are read.

        Raises:
            QuantizationError: it cannot be read rightly; naming a tensor and the scheme.
            CheckpointError: a file cannot be read.
        """
        others = [str(file) for file in files if not str(file).endswith(".safetensors")]
        if others:
            raise QuantizationError(
                f"{others[0]} is no safetensors file; low precision is read from those alone"
            )
        self.stored = read_headers(files)
        dtypes = {name: tensor.dtype for name, tensor in self.stored.items()}
        self.precision = LowPrecision(settings, dtypes)
        self.names = StoredNames(model, self.precision)
        self._experts = _expert_parameters(model)
        self._coarse = check_stored(self.precision, self.stored, self._is_like_expert)
        check_source(self.names, dtypes, self._coarse, self.precision.method)
        self._check_alike()
        self.expert_bytes = sum(t.size for name, t in self.stored.items() if self._is_expert(name))
        self.other_bytes = sum(t.size for t in self.stored.values()) - self.expert_bytes
        self.grown_bytes = self._count_others(model) + self._count_carried(model.dtype.itemsize)

    def _is_expert(self, name: str) -> bool:
        return self.names.target(name) in self._experts

    def _is_like_expert(self, name: str) -> bool:
        """Whether a tensor is of an expert, of a layer for prediction too."""
        return self._is_expert(name) or (".experts." in name and self.names.is_prediction_layer(name))

    def _check_alike(self) -> None:
        """Refuse experts that are in low precision only in part: transformers decodes all of a layer or none,
        and all of a model or none where weights in low precision have another name."""
        experts = [name for name in self.stored if is_weight(name) and self._is_expert(name)]
        renamed = any(name.endswith(".weight_packed") for name in experts)
        kinds: dict[str, dict[bool, StoredTensor]] = {}
        for name in experts:
            together = "" if renamed else self.names.target(name)
            kinds.setdefault(together, {})[name in self._coarse] = self.stored[name]
        mixed = next((found for found in kinds.values() if len(found) > 1), None)
        if mixed is not None:
            raise QuantizationError(
                f"{mixed[True]} is stored in {self.precision.method}, and {mixed[False]}, which transformers "
                "reads in the same way, is not in low precision; give a checkpoint in bfloat16"
            )

    def _count_others(self, model: Any) -> int:
        tensors = {id(t): t for n, t in model.state_dict(keep_vars=True).items() if n not in self._experts}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _count_carried(self, itemsize: int) -> int:
        """Bytes of what goes into the packed checkpoint and the model does not load."""
        carried = {name: t for name, t in self.stored.items() if self.names.is_carried(name)}
        plain = sum(tensor.size for name, tensor in carried.items() if name not in self._coarse)
        weights = [t for name, t in carried.items() if name in self._coarse and is_weight(name)]
        return plain + sum(itemsize * self.precision.values(t.dtype, t.count) for t in weights)

    def check_finite(self) -> None:
        """Read the scales of all weights.

        Raises:
            QuantizationError: naming one that is no number.
        """
        check_finite(self.precision, self.stored, self._coarse)

    def check_for_transformers(self) -> None:
        """To be called before transformers loads the checkpoint by itself.

        Raises:
            QuantizationError: naming a weight of which it would make other numbers.
        """
        for tensor in (self.stored[name] for name in sorted(self._coarse)):
            reason = self._misread(tensor)
            if reason is not None:
                raise QuantizationError(
                    f"{tensor} is stored in {self.precision.method}, {reason}: transformers loads it "
                    "wrongly; give a checkpoint in bfloat16 (quantizing this one works)"
                )

    def _misread(self, tensor: StoredTensor) -> str | None:
        """What transformers does not expect of a tensor in FP8."""
        block = self.precision.block
        if not tensor.dtype.startswith("F8") or not is_weight(tensor.name):
            return None
        if tensor.name.endswith(FUSED):
            return "in one piece for all experts"
        if block is None:
            return None
        sizes = zip(tensor.shape[-2:], block, strict=True)
        partial = any(size > width and size % width for size, width in sizes)
        return f"in blocks of {block[0]}x{block[1]}, the last of which is not whole" if partial else None

    def growth(self) -> str | None:
        """What is to be said of the size of all that is no routed expert; None: it does not grow."""
        if self.grown_bytes <= self.other_bytes:
            return None
        return (
            f"attention and the rest: {readable_size(self.grown_bytes)} stored, "
            f"{readable_size(self.other_bytes)} in the source ({self.precision.method}), because all but "
            "routed experts is stored unquantized"
        )


def _expert_parameters(model: nn.Module) -> set[str]:
    return {
        f"{layer.name}.{name}"
        for layer in find_moe_layers(model)
        for name, _ in layer.module.named_parameters(recurse=False)
    }


def source_in(folder: Path, model: Any, settings: Mapping[str, Any]) -> LowPrecisionSource | None:
    """What lies in a directory; None: not all of its files are there, so that only the method was checked.

    Raises:
        QuantizationError, CheckpointError: see ``LowPrecisionSource``.
    """
    files = [folder / SINGLE]
    if not files[0].is_file():
        stored = read_object(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else None
        files = [folder / name for name in sorted(set(weight_map(folder / INDEX).values()))] if stored else []
    if not files or not all(file.is_file() for file in files):
        LowPrecision(settings, folder_dtypes(folder))
        return None
    return LowPrecisionSource(model, settings, files)


def without_settings(configs: Iterable[Any]) -> None:
    """Take the ``quantization_config`` of a checkpoint out of the configs of a model's parts."""
    for config in configs:
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
