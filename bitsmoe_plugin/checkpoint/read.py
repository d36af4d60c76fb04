"""The quantization config of a packed checkpoint, from its directory."""

from __future__ import annotations

from pathlib import Path

from bitsmoe_plugin.checkpoint.model_sizes import check_model_sizes
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import read_model_config, safetensors_files


def read_config(directory: Path) -> BitsMoEConfig:
    """The quantization config of a packed checkpoint.

    Raises:
        CheckpointError: not a packed BitsMoE checkpoint.
    """
    model = read_model_config(Path(directory))
    values = model.get("quantization_config") or {}
    method = values.get("quant_method") if isinstance(values, dict) else None
    if not isinstance(values, dict) or method != QUANT_METHOD:
        raise CheckpointError(
            f"{directory} is not a packed BitsMoE checkpoint (quant_method is {str(method)[:80]!r}); "
            "make one with `bitsmoe quantize`"
        )
    config = BitsMoEConfig.from_dict(values)
    check_model_sizes(model, config)
    return config


def check_if_packed(directory: str | Path) -> None:
    """Refuse what a loader would trip over, if ``directory`` is that of a packed checkpoint.

    Raises:
        CheckpointError: config.json cannot be read, or is of a model with code of its own; or it is of a
            packed checkpoint, and sizes, files or headers are not sound.
    """
    if not (Path(directory) / "config.json").is_file():
        return
    found = read_model_config(Path(directory)).get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
        PackedFiles.open(safetensors_files(Path(directory)), read_config(Path(directory)))
