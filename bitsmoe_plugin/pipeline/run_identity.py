"""What the result of a quantization depends on: work of one run is continued only by the same run."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.base import native
from bitsmoe_plugin.calibration.blocks import Blocks, blocks_digest
from bitsmoe_plugin.checkpoint.other_tensors import fingerprint
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.expert_source import ExpertSource
from bitsmoe_plugin.models.files import header_text
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings
from bitsmoe_plugin.version import __version__

_ROOT = Path(__file__).parents[1]  # the package
_SOURCES = (".py", ".c", ".h", ".so")
_LIBRARIES = ("torch", "transformers", "numpy", "highspy")
_NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path", "transformers_version")
_MANIFEST = ("layers", "dense", "calibration", "other_tensors", "other_tensors_in_model")


def identity(model: nn.Module, blocks: Blocks, config: BitsMoEConfig, source: ExpertSource) -> dict[str, Any]:
    """JSON-ready. Of files, header and size are looked at; a layer's weights are hashed when they are read.

    Args:
        model: all but the experts of ``source`` are read.
        blocks: calibration tokens.
    """
    return {
        "code": {"bitsmoe-plugin": __version__, "sources": _sources(), **_libraries()},
        "machine": _machine(model),
        "config": {key: value for key, value in config.to_dict().items() if key not in _MANIFEST},
        "calibration tokens": f"{len(blocks)} blocks, {blocks_digest(blocks)[:16]}",
        "model": {
            "config": _config_digest(model),
            "weights outside the experts": _other_weights(model, source),
            "file": {path.name: _header(path) for path in source.files},
        },
    }


def tuning_identity(
    model: Any, files: Sequence[Path], blocks: Blocks, settings: TuningSettings
) -> dict[str, Any]:
    """The same of tuning layer by layer.

    Args:
        model: packed; its layers are known by the hashes of its manifest.
        files: of the original.
    """
    manifest = json.dumps(model.config.quantization_config.to_dict(), sort_keys=True)
    state = sorted(model.state_dict(keep_vars=True).items())
    others = (f"{name} {fingerprint(t)} ".encode() for name, t in state if ".bitsmoe_" not in name)
    options = {name: value for name, value in asdict(settings).items() if name != "through"}
    return {
        "code": {"bitsmoe-plugin": __version__, "sources": _sources(), **_libraries()},
        "machine": _machine(model),
        "settings": options,
        "calibration tokens": f"{len(blocks)} blocks, {blocks_digest(blocks)[:16]}",
        "packed model": _digest(manifest.encode(), *others),
        "original": {path.name: _header(path) for path in files},
    }


def pass_identity(
    model: Any, reference: nn.Module, blocks: Blocks, settings: TuningSettings
) -> dict[str, Any]:
    """The same of tuning through the whole model, of which all is in memory.

    Args:
        model: packed, as it is before the first step.
        reference: the original.
    """
    return {**tuning_identity(model, (), blocks, settings), "original": _weights(reference)}


def writing_identity(model: nn.Module, prompts: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """The same of text that a model writes, given all of it in memory.

    Args:
        prompts: token ids.
        settings: JSON-ready, everything else that decides.
    """
    return {
        "code": {"bitsmoe-plugin": __version__, "sources": _sources(), **_libraries()},
        "machine": _machine(model),
        "settings": settings,
        "prompts": f"{len(prompts)}, {_digest(prompts.numpy().tobytes())}",
        "model": {"config": _config_digest(model), "weights": _weights(model)},
    }


def _weights(model: nn.Module) -> str:
    tensors = sorted(model.state_dict(keep_vars=True).items())
    return _digest(*(f"{name} {fingerprint(tensor)} ".encode() for name, tensor in tensors))


def _config_digest(model: nn.Module) -> str:
    return _digest(json.dumps(_model_config(model), sort_keys=True, default=str).encode())


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def source_files() -> list[Path]:
    """Everything of this package that computes: all rooms, the compiled library, and what it was made of."""
    return sorted(path for path in _ROOT.rglob("*") if path.suffix in _SOURCES)


@cache
def _sources() -> str:
    """Digest of the files of this package, compiled ones included."""
    return _digest(*(f"{path.relative_to(_ROOT)} ".encode() + path.read_bytes() for path in source_files()))


def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vendored or built in place
            found[name] = "unknown"
    return found


def _machine(model: nn.Module) -> dict[str, Any]:
    """Sums of floating point numbers depend on in how many parts they are computed, and by what."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    return {
        "threads": torch.get_num_threads(),
        "instructions": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        # Compiled code sums in other orders with other instructions; None: plain torch instead of it.
        "compiled code for": native.select(None),
        "devices": [
            f"{name} {torch.cuda.get_device_name(name)}" if "cuda" in name else name for name in devices
        ],
    }


def _model_config(model: Any) -> dict[str, Any]:
    config = model.config
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    implementations = {name: getattr(config, f"_{name}_implementation", None) for name in ("attn", "experts")}
    return {**values, **implementations}


def _other_weights(model: nn.Module, source: ExpertSource) -> str:
    experts = {
        id(parameter) for layer in source.layers for parameter in layer.module.parameters(recurse=False)
    }
    tensors = sorted(model.state_dict(keep_vars=True).items())
    return _digest(*(f"{name} {fingerprint(t)} ".encode() for name, t in tensors if id(t) not in experts))


def _header(path: Path) -> str:
    """Size of a safetensors file and digest of its header."""
    return f"{path.stat().st_size} bytes, header {_digest(header_text(path))}"
