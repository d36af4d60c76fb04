"""Tuning of a model right after ``from_pretrained`` has quantized it (option ``tune``)."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.spans import span
from bitsmoe_plugin.base.work_directory import WorkDirectory, locked
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.calibration.blocks import Blocks
from bitsmoe_plugin.commands.tuning_way import settled
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.model_class import check_loadable, load_model
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.streamed_model import load_streamed
from bitsmoe_plugin.pipeline.descent_progress import begun
from bitsmoe_plugin.pipeline.tune_layers import Original
from bitsmoe_plugin.pipeline.tune_scales import check_blocks
from bitsmoe_plugin.pipeline.tuning import tune_by
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings

_REMEDY = "leave tune out, save the packed model, then use `bitsmoe tune`"


@dataclass(frozen=True)
class PlannedTuning:
    """What is needed once the model is quantized.

    Attributes:
        reference: where the unquantized model is loaded from again: its experts are gone by then.
        blocks: ``[blocks, sequence_length]`` int64, the calibration text.
        work_dir: of the quantization.
    """

    reference: ModelSource
    blocks: Tensor
    settings: TuningSettings
    work_dir: Path | None

    @classmethod
    def of(
        cls, model: Any, files: Sequence[str] | None, blocks: Blocks, config: BitsMoEConfig, device_map: Any
    ) -> PlannedTuning | None:
        """None if ``config`` asks for none.

        Args:
            model: of transformers, not loaded yet.
            files: of its weights.

        Raises:
            ConfigError: what cannot be tuned in the same call.
            QuantizationError: too little text.
        """
        if not config.tune:
            return None
        what = f"BitsMoEConfig: tune={config.tune} is not possible"
        if Workers.present().size > 1:
            raise ConfigError(f"{what} with several processes; {_REMEDY}")
        if isinstance(device_map, dict) and len({str(device) for device in device_map.values()}) > 1:
            raise ConfigError(f"{what} while device_map puts the model on several devices; {_REMEDY}")
        if not files:
            raise ConfigError(f"{what} for a model that is not loaded from files, which are read again")
        if not isinstance(blocks, Tensor):
            raise ConfigError(f"{what} with images in the calibration text; leave tune out, or the images")
        settings = TuningSettings.of(config)
        check_blocks(len(blocks), settings)
        reference = ModelSource.of_files(model.config._name_or_path, files)
        check_loadable(reference)
        work_dir = None if config.work_dir is None else Path(config.work_dir)
        return cls(reference, blocks, settings, work_dir)

    @contextmanager
    def _directory(self) -> Iterator[Path]:
        """Where what is finished is kept, and hidden states on their way."""
        if self.work_dir is not None:
            yield self.work_dir
            return
        with tempfile.TemporaryDirectory(prefix="bitsmoe-") as folder:
            try:
                yield Path(folder)
            except Interrupted as error:  # which says that there is something to go on with
                raise KeyboardInterrupt from error

    def run(self, model: Any) -> None:
        """Tune a packed model; a warning says so where nothing came closer."""
        device = next(model.parameters()).device
        config = copy.copy(model.config.quantization_config)
        config.sequence_length = self.blocks.shape[1]

        def original() -> Original:
            return Original(*load_streamed(self.reference, model.dtype, device))

        def reference() -> Any:
            return load_model(self.reference, dtype=model.dtype).eval().to(device)

        with span("tuning"), self._directory() as path, locked(path):
            directory, tokens = WorkDirectory(path), self.blocks.numel()
            given = self.settings, self.reference.config(), config, tokens, device, begun(directory)
            result = tune_by(
                settled(*given),
                model,
                self.blocks,
                original=original,
                reference=reference,
                directory=directory,
                lasting=self.work_dir is not None,
            )
        if not result.epoch:
            warnings.warn(
                f"tune={self.settings.epochs}: no epoch came closer to the original on the text held out (KL "
                f"{result.before:.4f} before), so the model stays as it was quantized; more calibration text "
                "helps",
                stacklevel=2,
            )
