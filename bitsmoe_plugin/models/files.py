"""Files of a checkpoint that others wrote: which belong to it, and what may stand in their headers.

Nothing here trusts a number or a name of a file. safetensors itself refuses a header that is longer than
100 MB or than the file, that is no JSON, offsets that overlap, leave a hole, run backwards or end elsewhere
than the file, and offsets that do not fit shape and dtype. It does not notice a name that stands twice in a
header or in two files, it knows nothing of the index, and it opens any path that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.json_objects import parse_object, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
"""Loaders look at no index where there is one."""
_LARGEST_HEADER = 10**8
"""As in safetensors."""
_LONGEST_NAME = 512


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model.

    Raises:
        CheckpointError: see ``read_object``; the model is known only to code of its own, which is not run;
            or quantization_config is no object.
    """
    from transformers import CONFIG_MAPPING

    values = read_object(folder / "config.json")
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder} is of model_type {str(values.get('model_type'))[:80]!r}, which transformers does not "
            "know; the code that it brings along is not run"
        )
    settings = values.get("quantization_config")
    if not isinstance(settings, (dict, type(None))):
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged (its quantization_config is a {type(settings).__name__}, "
            "not an object); download or make it again"
        )
    return values


def check_file_name(name: Any, index: Path) -> None:
    """Refuse what an index names if it is anything but a safetensors file of its own directory.

    Raises:
        CheckpointError: an absolute path, another directory, another kind of file, or no name at all.
    """
    plain = isinstance(name, str) and name.isprintable() and len(name) <= 255
    if not plain or not name.endswith(".safetensors") or any(c in name for c in "/\\:"):
        raise CheckpointError(
            f"{index} names {str(name)[:_LONGEST_NAME]!r}; files of a checkpoint are named like "
            "model-00001-of-00002.safetensors and stand next to their index"
        )


def check_place(path: Path, folder: Path) -> None:
    """Refuse a file that is not in ``folder``, by its path or through a link.

    The cache of the hub is links from ``snapshots/<revision>/`` to ``blobs/`` next to ``snapshots``; those
    are followed.

    Raises:
        CheckpointError: naming the path.
    """
    try:
        root, real = folder.resolve(), path.resolve()
        inside = ".." not in path.relative_to(folder).parts and real.is_relative_to(root)
    except (OSError, ValueError, RuntimeError):
        inside, real, root = False, path, folder
    blobs = root.parent.parent / "blobs"
    cached = root.parent.name == "snapshots" and path.parent == folder and real.parent == blobs
    if not (inside or cached):
        raise CheckpointError(f"{path} leads out of the checkpoint's directory {folder}; it is not read")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file")


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says.

    Raises:
        CheckpointError: it cannot be read, has no map, or see ``check_file_name``.
    """
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} is damaged (it has no weight_map)")
    for name in places.values():
        check_file_name(name, index)
    return places


def safetensors_files(folder: Path, index_name: str = INDEX) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index if it has one, else all.

    Raises:
        CheckpointError: there are none, one of the index is missing or elsewhere, or the index does not
            say of every tensor, and of no other, where it is.
    """
    index = folder / index_name
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} lacks safetensors files")
        for file in files:
            check_place(file, folder)
        return files
    places = weight_map(index)
    files = [folder / name for name in sorted(set(places.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}")
    for file in files:
        check_place(file, folder)
    _compare_with_index(index, places, files)
    return files


def _compare_with_index(index: Path, places: dict[str, str], files: list[Path]) -> None:
    found = {name: file.name for name, file in tensor_files(files).items()}
    for name in places.keys() | found.keys():
        if places.get(name) != found.get(name):
            raise CheckpointError(
                f"{index} has {name[:_LONGEST_NAME]} in {places.get(name, 'no file')}, but it is in "
                f"{found.get(name, 'no file')}"
            )


def check_loaded_files(files: Iterable[str | Path], folder: Path) -> None:
    """Refuse files that a loader found for a checkpoint and that do not belong to it.

    Args:
        folder: the checkpoint's directory; anything else, such as a name on the hub, stands for the
            directory of the first file.

    Raises:
        CheckpointError: naming the file.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no safetensors file; packed checkpoints hold nothing else (save the "
                "model with save_pretrained)"
            )
        check_place(path, folder if folder.is_dir() else paths[0].parent)
    for parent in {path.parent for path in paths}:
        if (parent / INDEX).is_file() and [path.name for path in paths] != [SINGLE]:
            safetensors_files(parent)


def _damaged(path: Path | str) -> str:
    return f"{path} cannot be read as safetensors"


def open_tensors(path: Path | str) -> Any:
    """A safetensors file, whose tensors are read when they are asked for; to be closed, or used in ``with``.

    Raises:
        CheckpointError: it is damaged, or cannot be read.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{_damaged(path)} ({error})") from error


def header_text(path: Path) -> bytes:
    """The header of a safetensors file as it stands there.

    Raises:
        CheckpointError: the file cannot be read, or is shorter than its header or than any.
    """
    damaged = _damaged(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(f"{damaged} (its header would have {length} of {size} bytes)")
            return file.read(length)
    except OSError as error:
        raise CheckpointError(f"{damaged} ({error})") from error


def read_header(path: Path) -> dict[str, Any]:
    """Tensor name -> dtype, shape and data_offsets of one file, as its header says.

    Raises:
        CheckpointError: see ``header_text``; the header is no object, or holds a name twice, a name that
            cannot be one, or a shape or offsets that are no sizes.
    """
    damaged = _damaged(path)
    header = parse_object(header_text(path), f"{damaged}: its header")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            raise CheckpointError(f"{damaged} ({name[:80]!r} is no name of a tensor)")
        parts = entry if isinstance(entry, dict) else {}
        if not _are_sizes(parts.get("shape")):
            raise CheckpointError(f"{damaged} ({name} has no shape)")
        if not _are_sizes(parts.get("data_offsets")) or len(parts["data_offsets"]) != 2:
            raise CheckpointError(f"{damaged} ({name} has no data_offsets)")
    return header


def check_whole(path: Path) -> None:
    """Refuse a safetensors file that ends before its tensors do.

    Raises:
        CheckpointError: it does, or see ``read_header``.
    """
    ends = [entry["data_offsets"][1] for entry in read_header(path).values()]
    whole, size = 8 + len(header_text(path)) + max(ends, default=0), path.stat().st_size
    if size < whole:
        raise CheckpointError(
            f"{_damaged(path)} (it is truncated: {size} of {whole} bytes); download it again"
        )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def tensor_files(files: Iterable[Path]) -> dict[str, Path]:
    """Tensor name -> file.

    Raises:
        CheckpointError: a name stands in two files, or see ``read_header``.
    """
    found: dict[str, Path] = {}
    for path in files:
        for name in read_header(path):
            if name in found:
                raise CheckpointError(f"{name} in {path} stands a second time in {found[name]}")
            found[name] = path
    return found
