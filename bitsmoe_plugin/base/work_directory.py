"""A directory that survives the death of its process at any moment.

Files appear complete or not at all: each is written under a temporary name, synced and renamed. A journal
says which files count and holds the SHA-256 of each; it is replaced in the same way, so the directory is
always in the state of one journal. What the journal does not name is debris of an interrupted write.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitsmoe_plugin.errors import QuantizationError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_VERSION = 1
_JOURNAL = "journal.json"
_LOCK = "lock"
_TEMPORARY = ".tmp"
OUTPUT = "checkpoint"
"""Directory for what is made of the finished work; no part of its state."""
_FILE = r"[a-z]+(-\d+){0,2}\.safetensors"
_OURS = re.compile(rf"(({_JOURNAL}|{_FILE})({re.escape(_TEMPORARY)})?|{_LOCK}|{OUTPUT})")

_held: dict[Path, tuple[int, int]] = {}
"""Directory -> thread that holds its lock, and how often it has asked for it."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a directory, which is created, for this thread; again inside is no conflict. Folders that were
    created above it are removed again if they are empty at the end.

    Raises:
        QuantizationError: it is in use, no directory, holds foreign files, or cannot be locked here.
    """
    path = path.resolve()
    thread = threading.get_ident()
    owner, depth = _held.get(path, (thread, 0))
    if owner != thread:
        raise _in_use(path)
    if depth:
        _held[path] = thread, depth + 1
        try:
            yield
        finally:
            _held[path] = thread, depth
        return
    with writing(path):
        created = [folder for folder in path.parents if not folder.exists()]
    try:
        descriptor = _lock(path)
        _held[path] = thread, 1
        try:
            yield
        finally:
            del _held[path]
            os.close(descriptor)
    finally:
        _remove_empty(created)


def _remove_empty(folders: list[Path]) -> None:
    """From the innermost, up to the first that is in use."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _is_ours(entry: Path) -> bool:
    """Whether a run may have left this, also one killed while safetensors wrote (.tmp and letters)."""
    if entry.is_dir() and entry.name != OUTPUT:
        return False
    return bool(_OURS.fullmatch(entry.name)) or re.fullmatch(r"\.tmp\w+", entry.name) is not None


def _in_use(path: Path) -> QuantizationError:
    return QuantizationError(f"work directory {path} is in use by another run; wait for it or stop it")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain why ``path`` cannot be written: full disk, no permission, a file where a directory is needed.

    Raises:
        QuantizationError: instead of the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise QuantizationError(
            f"{path} cannot be written ({error}); make room, allow it or choose another place, then start "
            "the same again"
        ) from error


def _lock(path: Path) -> int:
    """Descriptor of the locked lock file; the lock ends with the process, however that ends."""
    with writing(path):
        return _lock_file(path)


def _lock_file(path: Path) -> int:
    if fcntl is None:
        raise QuantizationError("a work directory needs file locks, which this system does not have")
    if path.exists() and not path.is_dir():
        raise QuantizationError(f"work directory {path} is a file; choose another name")
    while True:
        path.mkdir(parents=True, exist_ok=True)
        foreign = [entry.name for entry in path.iterdir() if not _is_ours(entry)]
        if foreign:
            raise QuantizationError(
                f"{path} holds {sorted(foreign)[0]}, so it is not a work directory; choose another"
            )
        try:
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its last user has just removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path / _LOCK)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise _in_use(path) from error
        except FileNotFoundError:
            pass
        os.close(descriptor)  # of a lock file that was removed meanwhile


def remove(path: Path) -> None:
    """Remove a work directory that this thread holds."""
    (path / _JOURNAL).unlink(missing_ok=True)  # first: without it, nothing else counts
    shutil.rmtree(path, ignore_errors=True)


def has_progress(path: Path) -> bool:
    """Whether anything but an empty journal has been written."""
    return any(path.glob("*.safetensors"))


@contextmanager
def staging(path: Path) -> Iterator[None]:
    """Hold a directory in which ``OUTPUT`` is made; what is there afterwards is removed, but not progress.

    Raises:
        QuantizationError: see ``locked``.
    """
    with locked(path):
        try:
            yield
        finally:
            shutil.rmtree(path / OUTPUT, ignore_errors=True)
            if not has_progress(path):
                remove(path)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make all files below a directory durable."""
    for folder, _, files in os.walk(path):
        for name in files:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _read(file)
        )


def _read(file: Any) -> str:
    """For Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _removed_if_it_fails(temporary: Path) -> Iterator[None]:
    """Give the room of a half-written file back at once."""
    try:
        yield
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two JSON objects differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [
            text
            for key in keys
            for text in _differences(there.get(key), here.get(key), f"{name} {key}".strip())
        ]
    return [] if there == here else [f"{name} was {there}, is {here}"]


class WorkDirectory:
    """State (a JSON object) and files of tensors, under the lock that the caller holds.

    ``write`` and ``forget`` take effect with the next ``commit``.
    """

    def __init__(self, path: Path) -> None:
        """Open what an earlier run left, or start; files that do not count are removed.

        Raises:
            QuantizationError: the journal or a file is damaged.
        """
        self.path = path.resolve()
        self.state: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        self._obsolete: list[str] = []
        if (self.path / _JOURNAL).exists():
            self._read_journal()
            for name, digest in self._files.items():
                self._verify(name, digest)
        for entry in self.path.iterdir():
            if entry.name == OUTPUT:
                shutil.rmtree(entry)
            elif entry.name not in (*self._files, _JOURNAL, _LOCK):
                entry.unlink()

    def damaged(self, what: str) -> QuantizationError:
        """An error that says what is wrong and what to do."""
        return QuantizationError(
            f"work directory {self.path}: {what}. Remove the directory to start over: rm -r {self.path}"
        )

    def check_identity(self, found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
        """
        Args:
            found: identity of the run that the directory holds, JSON-ready.
            wanted: of the one that goes on, likewise.
            what: is held, for the message: "progress", "tuning".

        Raises:
            QuantizationError: they differ.
        """
        as_read = [json.loads(json.dumps(identity)) for identity in (found, wanted)]
        changes = _differences(*as_read)
        if changes:
            raise self.damaged(f"it holds the {what} of another run: {'; '.join(changes)}")

    def _read_journal(self) -> None:
        try:
            journal = json.loads((self.path / _JOURNAL).read_text(encoding="utf-8"))
            version, digest, content = journal["version"], journal["sha256"], journal["content"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(f"{_JOURNAL} cannot be read ({type(error).__name__}: {error})") from error
        if version != _VERSION:
            raise self.damaged(f"{_JOURNAL} has version {version}, this release reads {_VERSION}")
        if _text_digest(json.dumps(content)) != digest:
            raise self.damaged(f"{_JOURNAL} was altered")
        self.state, self._files = content["state"], content["files"]

    def _verify(self, name: str, digest: str) -> None:
        try:
            found = _sha256(self.path / name)
        except OSError as error:
            raise self.damaged(f"{name} cannot be read ({error})") from error
        if found != digest:
            raise self.damaged(f"{name} is damaged or was altered")

    def write(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any] | None = None) -> None:
        """Write a file.

        Args:
            name: letters, up to two numbers with a hyphen before each, ``.safetensors``.
            values: JSON-ready, stored with the tensors.
        """
        assert _OURS.fullmatch(name), name
        temporary = self.path / (name + _TEMPORARY)
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with writing(self.path / name), _removed_if_it_fails(temporary):
            save_file(whole, temporary, metadata={"values": json.dumps(values or {})})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            self._files[name] = _sha256(temporary)
            os.replace(temporary, self.path / name)

    def forget(self, name: str) -> None:
        """Remove a file, if it is there, once the next journal no longer names it."""
        if self._files.pop(name, None) is not None:
            self._obsolete.append(name)

    def holds(self, name: str) -> bool:
        """Whether a file of this name counts, or will with the next ``commit``."""
        return name in self._files

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of a file, mapped into memory, and its values.

        Raises:
            QuantizationError: it cannot be read.
        """
        try:
            with safe_open(self.path / name, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in list(file.keys())}
                return tensors, json.loads(file.metadata()["values"])
        except (OSError, SafetensorError) as error:
            raise self.damaged(f"{name} cannot be read ({error})") from error

    def commit(self) -> None:
        """Make the state and all files written so far what the next run finds."""
        content = {"state": self.state, "files": self._files}
        journal = {"version": _VERSION, "sha256": _text_digest(json.dumps(content)), "content": content}
        temporary = self.path / (_JOURNAL + _TEMPORARY)
        with writing(self.path / _JOURNAL), _removed_if_it_fails(temporary):
            sync_directory(self.path)  # the files must be there before the journal that names them
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(journal, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / _JOURNAL)
            sync_directory(self.path)
        for name in self._obsolete:
            (self.path / name).unlink(missing_ok=True)
        self._obsolete = []
