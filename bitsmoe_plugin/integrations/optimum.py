"""BitsMoE as a quantizer of optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer

from bitsmoe_plugin.base.tested_versions import check_versions
from bitsmoe_plugin.commands.quantize import quantize_to_directory
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.model_source import ModelSource

check_versions("optimum")


class BitsMoEQuantizer(OptimumQuantizer):
    """Quantizes a saved model into a directory, as ``bitsmoe quantize`` does.

    Args:
        model: directory or hub name, or both with what else it takes to find it.
    """

    def __init__(self, model: str | ModelSource) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls, model_or_path: str | Path, file_name: str | None = None, **options: Any
    ) -> BitsMoEQuantizer:
        """Note which model is to be quantized. Its weights are read by ``quantize``, layer by layer.

        Args:
            model_or_path: directory or hub name.
            file_name: of optimum's interface; not used here.
            options: revision, subfolder, cache_dir, token, local_files_only, trust_remote_code: as of
                ``ModelSource``, for the model and its tokenizer.

        Raises:
            ConfigError: a loaded model, a file name or an unknown option was given.
        """
        if not isinstance(model_or_path, (str, Path)):
            raise ConfigError(
                f"BitsMoEQuantizer.from_pretrained: {type(model_or_path).__name__} is no directory or hub "
                "name; experts are read from the model's files layer by layer, so save the model and give "
                "its directory"
            )
        if file_name is not None:
            raise ConfigError(
                f"BitsMoEQuantizer.from_pretrained: file_name={file_name!r} is not allowed; all files of a "
                "model are quantized together, leave it out"
            )
        return cls(ModelSource.of(model_or_path, **options))

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        quantization_config: BitsMoEConfig | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Quantize and save packed, with the tokenizer; see ``quantize_to_directory``.

        Args:
            save_dir: directory to write; must not exist or be empty.
            file_prefix: of optimum's interface; not used here.
            quantization_config: all options at once, also as a dict.
            options: or single ones, by their names in ``BitsMoEConfig``: bits=2.0, dataset="text.jsonl".

        Raises:
            BitsMoEError: bad input. Nothing is left behind but layers that were finished.
            Interrupted: Ctrl-C; says how to go on.
        """
        if file_prefix is not None:
            raise ConfigError(
                f"BitsMoEQuantizer.quantize: file_prefix={file_prefix!r} is not allowed; files have the "
                "names that transformers loads, leave it out"
            )
        if quantization_config is not None and options:
            raise ConfigError(
                f"BitsMoEQuantizer.quantize: give quantization_config or single options, not both "
                f"({', '.join(sorted(options))})"
            )
        given = options if quantization_config is None else quantization_config
        quantize_to_directory(self.model, Path(save_dir), BitsMoEConfig.checked_copy(given))
