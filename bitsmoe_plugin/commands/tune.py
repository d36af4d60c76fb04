"""Tune a packed checkpoint: read it and what it was quantized from, write another one of the same size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.atomic_output import check_output_directory
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.work_directory import OUTPUT, staging, writing
from bitsmoe_plugin.calibration.text import load_documents, token_blocks
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.commands.evaluate import load_for_evaluation, load_reference
from bitsmoe_plugin.commands.quantize import write_checkpoint
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.model_class import check_loadable
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.side_files import side_files
from bitsmoe_plugin.models.tokenizer import load_tokenizer
from bitsmoe_plugin.pipeline.tune_scales import Tuning, TuningSettings, tune


@known_state(gradients=True)
def tune_to_directory(
    model: str | ModelSource,
    reference: str | ModelSource,
    out: Path,
    dataset: Any,
    settings: TuningSettings,
    *,
    calibration_tokens: int,
    sequence_length: int,
    device: str = "cpu",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Tuning:
    """See ``tune_scales.tune``. ``out`` takes its name at the end, so it is either absent or complete.

    Args:
        model: directory of a packed model.
        reference: directory or hub name of what it was quantized from.
        dataset, calibration_tokens, sequence_length, chat_template_kwargs: as of ``BitsMoEConfig``. With
            those that the model was quantized with, and the same seed, the blocks held out are those that
            were held out then.

    Raises:
        BitsMoEError: bad input, or nothing was better on the blocks held out. Nothing is left behind.
    """
    BitsMoEConfig(calibration_tokens=calibration_tokens, sequence_length=sequence_length)  # it checks them
    out, packed_source, origin = Path(out).resolve(), ModelSource.of(model), ModelSource.of(reference)
    check_output_directory(out)
    read_config(Path(packed_source.name))
    check_loadable(origin)
    documents = load_documents(dataset, max_tokens=calibration_tokens, sequence_length=sequence_length)
    tokenizer = load_tokenizer(packed_source)
    saved = copy.deepcopy(tokenizer)  # encoding leaves traces, which should not be saved
    beside_weights = side_files(packed_source)
    work = out.with_name(f"{out.name}.work")
    with staging(work):  # from the start: what cannot be written should not show at the end
        packed = load_for_evaluation(packed_source, device)
        blocks = token_blocks(
            documents,
            tokenizer,
            sequence_length=sequence_length,
            max_tokens=calibration_tokens,
            vocab_size=packed.get_input_embeddings().num_embeddings,
            seed=settings.seed,
            chat_template_kwargs=chat_template_kwargs,
        )
        result = tune(packed, load_reference(origin, packed), blocks, settings)
        if not result.epoch:
            raise QuantizationError(
                f"no epoch came closer to {origin.name} on the text held out (KL {result.before:.4f} "
                "before), so nothing was written; give more text (calibration_tokens) or a smaller learning "
                "rate"
            )
        with writing(out):
            partial = work / OUTPUT
            write_checkpoint(packed.to("cpu"), saved, origin.name, dataset, partial, out, beside_weights)
    return result
