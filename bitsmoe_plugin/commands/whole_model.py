"""Bytes of a whole model by part, and how many of them are read for each token that is generated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.codec.dense import PACKED, SCALE, SHAPE, dense_key
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.files import read_header, read_model_config

EXPERTS, ATTENTION, MLP, HEAD, EMBEDDINGS, OTHER = (
    "experts",
    "attention",
    "shared experts and dense layers",
    "head",
    "embeddings",
    "other",
)
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
_BASES = ("basis", "basis_scales", "input_scales", "output_scales")
_ROUTERS = (".gate.", ".router.", ".shared_expert_gate.")


@dataclass(frozen=True)
class Part:
    """Attributes:
    bytes: stored.
    weights: of the unquantized model.
    """

    bytes: int = 0
    weights: int = 0

    def plus(self, size: int, weights: int) -> Part:
        return Part(self.bytes + size, self.weights + weights)


def whole_model(directory: Path, files: PackedFiles, paths: Iterable[Path]) -> dict[str, Any]:
    """Sizes of a packed checkpoint, JSON-ready.

    Returns:
        ``total_bytes`` of all tensors, ``total_weights`` that they stand for, ``total_bits_per_weight``;
        ``by_part``: ``bytes``, ``weights`` and ``bits_per_weight`` of each part that there is; and
        ``read_per_token``: bytes by part that generating one token reads, without the KV cache; of the
        experts those that are chosen for it. It is empty if config.json does not say how many that are.
    """
    parts = dict.fromkeys((EXPERTS, ATTENTION, MLP, HEAD, EMBEDDINGS, OTHER), Part())
    for spec in files.specs.values():
        parts[EXPERTS] = parts[EXPERTS].plus(sum(_sizes(spec).values()), spec.shape.weights)
    dense = {dense_key(layer.name): layer for layer in files.dense}
    for path in paths:
        for name, entry in read_header(path).items():
            if ".bitsmoe_" in name:
                continue
            layer, _, tensor = name.rpartition(".")
            size = math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 1)
            weights = math.prod(entry["shape"])
            if dense_key(layer) in dense and tensor in (PACKED, SCALE, SHAPE):
                stored = dense[dense_key(layer)]
                weights = stored.outputs * stored.inputs if tensor == PACKED else 0
            part = _part(name, len(entry["shape"]))
            parts[part] = parts[part].plus(size, weights)
    total = Part(sum(p.bytes for p in parts.values()), sum(p.weights for p in parts.values()))
    return {
        "total_bytes": total.bytes,
        "total_weights": total.weights,
        "total_bits_per_weight": 8 * total.bytes / total.weights,
        "by_part": {
            name: {**vars(part), "bits_per_weight": 8 * part.bytes / part.weights}
            for name, part in parts.items()
            if part.weights
        },
        "read_per_token": _read_per_token(directory, files, parts),
    }


def _part(name: str, dimensions: int) -> str:
    """Which part a tensor that is not packed belongs to, by its name in the files."""
    if name.startswith("lm_head.") or ".lm_head." in name:
        return HEAD
    if "embed_tokens." in name or ".wte." in name:
        return EMBEDDINGS
    decoder = ".layers." in f".{name}" and not any(part in name for part in ("visual", "vision", "mtp"))
    is_linear = dimensions == 2 or name.endswith(SHAPE)
    if not decoder or not is_linear or any(router in name for router in _ROUTERS):
        return OTHER
    return ATTENTION if "attn" in name or "attention" in name or "mixer" in name else MLP


def _sizes(spec: PackedSpec) -> dict[str, int]:
    return {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in spec.tensors().items()}


def _read_per_token(directory: Path, files: PackedFiles, parts: dict[str, Part]) -> dict[str, int]:
    model = read_model_config(Path(directory))
    text = model.get("text_config")
    values = {**model, **(text if isinstance(text, dict) else {})}
    chosen = next((n for key in _PER_TOKEN if type(n := values.get(key)) is int), None)
    if chosen is None:
        return {}
    bases = rows = 0
    for spec in files.specs.values():
        sizes = _sizes(spec)
        own = sum(size for name, size in sizes.items() if name.removeprefix("bitsmoe_").endswith(_BASES))
        bases += own
        rows += (sum(sizes.values()) - own) * min(chosen, spec.shape.num_experts) // spec.shape.num_experts
    head = parts[HEAD].bytes or parts[EMBEDDINGS].bytes  # tied: the embeddings are the head
    read = {
        ATTENTION: parts[ATTENTION].bytes,
        MLP: parts[MLP].bytes,
        "selected experts": rows,
        "bases of the experts": bases,
        HEAD: head,
    }
    return {name: size for name, size in read.items() if size}


def told(sizes: dict[str, Any]) -> str:
    """Lines about ``whole_model``, for tables and cards."""
    lines = [
        f"whole model: {sizes['total_bytes']:,} bytes for {sizes['total_weights']:,} weights, "
        f"{sizes['total_bits_per_weight']:.3f} bits per weight"
    ]
    lines += [
        f"  {name}: {part['bytes']:,} bytes, {part['bits_per_weight']:.3f} bits per weight"
        for name, part in sizes["by_part"].items()
    ]
    read = sizes["read_per_token"]
    if read:
        parts = ", ".join(f"{name} {size:,}" for name, size in read.items())
        lines.append(f"read for each generated token: {sum(read.values()):,} bytes = {parts}")
    return "\n".join(lines)
