"""Where a model is loaded from: its config, its weights and its tokenizer all come from the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import cached_file

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.files import read_model_config
from bitsmoe_plugin.models.model_config import load_config


@dataclass(frozen=True)
class ModelSource:
    """A model's name and what else ``from_pretrained`` takes to find it.

    Attributes:
        name: directory, or name on the hub. Of a directory with ``subfolder`` it becomes that folder.
        revision: branch, tag or commit on the hub.
        subfolder: of the repository or directory in which the model and its tokenizer are.
        cache_dir: where files of the hub are kept.
        token: for the hub; None: that of the environment (``HF_TOKEN``) or of ``hf auth login``.
        local_files_only: ask the hub for nothing.
        trust_remote_code: run the code that a tokenizer brings along. That of models is never run: their
            experts are found in transformers' own classes.

    Raises:
        ConfigError: an option of another type, a folder that does not exist, or a revision of a directory.
    """

    name: str
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[type, ...]] = {
            "name": (str,),
            "revision": (str, type(None)),
            "subfolder": (str,),
            "cache_dir": (str, type(None)),
            "token": (str, bool, type(None)),
            "local_files_only": (bool,),
            "trust_remote_code": (bool,),
        }
        for name in ("name", "cache_dir", "subfolder"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        for name, types in allowed.items():
            value = getattr(self, name)
            if not isinstance(value, types):
                names = " or ".join("None" if t is type(None) else t.__name__ for t in types)
                raise ConfigError(f"{name} is a {type(value).__name__}; allowed: {names}")
        if not self.name:
            raise ConfigError("the name of a model is empty; give a directory or its name on the hub")
        if Path(self.name).is_dir():
            self._settle_directory()

    def _settle_directory(self) -> None:
        if self.revision is not None:
            raise ConfigError(
                f"revision={self.revision!r} is of a model on the hub, but {self.name} is a directory; leave "
                "it out"
            )
        folder = Path(self.name) / self.subfolder
        if not folder.is_dir():
            raise ConfigError(f"subfolder={self.subfolder!r}: {folder} does not exist")
        if self.subfolder:
            object.__setattr__(self, "name", str(folder))
            object.__setattr__(self, "subfolder", "")

    @classmethod
    def of(cls, model: str | Path | ModelSource, **options: Any) -> ModelSource:
        """The source of a model that is given by its name, with options by the names of the attributes.

        Raises:
            ConfigError: an unknown option, or see the class.
        """
        known = [f.name for f in fields(cls) if f.name != "name"]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(unknown)} for a model's files; known: {', '.join(known)}"
            )
        return replace(model, **options) if isinstance(model, ModelSource) else cls(str(model), **options)

    @classmethod
    def of_files(cls, name: str, files: Sequence[str | Path] | None) -> ModelSource:
        """Where a loader that is done has found a model, whatever options it was given.

        A token and ``trust_remote_code`` cannot be seen there; those of the environment hold.

        Args:
            name: what it was given.
            files: of the weights that it found; None: there were none.
        """
        if not files:
            return cls(name)
        folder = Path(files[0]).parent
        if not Path(name).exists():
            repository = repo_folder_name(repo_id=name, repo_type="model")
            for snapshot in (folder, *folder.parents):
                if snapshot.parent.name == "snapshots" and snapshot.parents[1].name == repository:
                    inside = folder.relative_to(snapshot).as_posix()
                    cache = str(snapshot.parents[2])
                    return cls(name, snapshot.name, "" if inside == "." else inside, cache)
        return cls(str(folder))

    def elsewhere(self, name: str | Path) -> ModelSource:
        """Another model or tokenizer, found in the same way: it has a revision and a subfolder of its own."""
        return replace(self, name=str(name), revision=None, subfolder="")

    def hub(self) -> dict[str, Any]:
        """What is given, as keyword arguments of ``from_pretrained``, without ``trust_remote_code``."""
        ours = ("name", "trust_remote_code")
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in given.items() if name not in ours}

    def config(self) -> Any:
        """Config of the model, by transformers.

        Raises:
            CheckpointError: a damaged config.json, or one of a model that only code of its own knows.
            QuantizationError: see ``load_config``.
            OSError: nothing is found.
        """
        folder = Path(self.name)
        if not folder.is_dir():
            folder = Path(str(cached_file(self.name, "config.json", **self.hub()))).parent
        read_model_config(folder)
        return load_config(self.name, **self.hub())

    def directory(self, patterns: Sequence[str] = (), but: Sequence[str] = ()) -> Path:
        """Where the files lie on this machine; downloads them if need be.

        Args:
            patterns: of the names of files that are needed; none: all.
            but: of those that are not, though they match.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        options = {name: value for name, value in self.hub().items() if name != "subfolder"}
        inside = f"{self.subfolder}/" if self.subfolder else ""
        wanted = [inside + pattern for pattern in patterns or ("*",)] if inside or patterns else None
        unwanted = [inside + pattern for pattern in but] or None
        found = snapshot_download(self.name, allow_patterns=wanted, ignore_patterns=unwanted, **options)
        return Path(found) / self.subfolder
