"""Ways to alter linear layers in 8 or 4 bits of a checkpoint; name -> change of a directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER = "model.layers.1.self_attn"
REFUSED = r"altered|missing|not in its quantization_config"
"""What is said of each of ``ALTERED``."""


def _rewritten(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["other_tensors"] = {}  # as who alters it on purpose would
        config["quantization_config"].pop("other_tensors_in_model", None)
        (path / "config.json").write_text(json.dumps(config))

    return apply


def _section(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config["quantization_config"]["dense"])
        (path / "config.json").write_text(json.dumps(config))

    return apply


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return _rewritten(lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous()))


def _weights(key: str, value: int) -> Callable[[Path], None]:
    return _section(lambda dense: dense["config_groups"]["group_0"]["weights"].__setitem__(key, value))


ALTERED: dict[str, Callable[[Path], None]] = {
    "nan scale": _set(f"{LAYER}.q_proj.weight_scale", lambda t: t * torch.nan),
    "negative scale": _set(f"{LAYER}.q_proj.weight_scale", lambda t: -t),
    "cut": _set(f"{LAYER}.q_proj.weight_packed", lambda t: t[:, :8]),
    "other dtype": _set(f"{LAYER}.q_proj.weight_packed", lambda t: t.long()),
    "other shape": _set(f"{LAYER}.q_proj.weight_shape", lambda t: t * 2),
    "missing": _rewritten(lambda tensors: tensors.__delitem__(f"{LAYER}.q_proj.weight_scale")),
    "surplus": _rewritten(
        lambda tensors: tensors.__setitem__("model.norm.weight_packed", torch.ones(2, 2, dtype=torch.int32))
    ),
    "bits": _weights("num_bits", 8),
    "group": _weights("group_size", 32),
    "activations": _section(lambda dense: dense["config_groups"]["group_0"].__setitem__("x", {"a": 8})),
    "unknown layer": _section(lambda dense: dense["config_groups"]["group_0"]["targets"].append("zzz.a")),
    "no table": _section(lambda dense: dense.__setitem__("config_groups", [1])),
}
