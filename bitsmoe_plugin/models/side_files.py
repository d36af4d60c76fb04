"""Files beside a model's weights: processor, chat template, generation defaults, licence."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import check_place
from bitsmoe_plugin.models.model_source import ModelSource

_CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*", "*POLICY*")
_CODE = "*.py"
"""Carried if it may be run: what a tokenizer or processor brings along is needed to load it."""
_LEFT = (
    ".*",
    "*.index.json",  # of weights, also in other formats
    "*.safetensors*",
    "*.bin*",
    "*.pt*",
    "*.gguf*",
    "*.onnx*",
    "config.json",  # written anew, as is the model card
    "README.md",
    "*quant*config.json",  # what another program did to the weights
    "adapter_*",
    "params.json",  # of the authors' own format
    "consolidated*",
    "trainer_state.json",
)


def side_files(source: ModelSource) -> list[Path]:
    """The files, on this machine; those of a model on the hub are downloaded.

    Weights, and what describes weights in another format, are none of them. A link that leads out of a
    directory is left out, with a warning.

    Args:
        source: its ``trust_remote_code`` says whether files with code are among them.
    """
    patterns = (*_CARRIED, *([_CODE] if source.trust_remote_code else ()))
    folder = source.directory(patterns, _LEFT)
    found = []
    for path in sorted(folder.iterdir()):
        if not any(fnmatch(path.name, p) for p in patterns) or any(fnmatch(path.name, p) for p in _LEFT):
            continue
        try:
            check_place(path, folder)
        except CheckpointError as error:
            if not path.is_dir():
                warnings.warn(f"not carried over: {error}", stacklevel=2)
            continue
        if path.is_file():
            found.append(path)
    return found


def copy_side_files(files: Iterable[Path], folder: Path, replace: bool = False) -> None:
    """Copy files into ``folder``.

    Args:
        replace: what is there already, which otherwise stays.
    """
    for path in files:
        if replace or not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
