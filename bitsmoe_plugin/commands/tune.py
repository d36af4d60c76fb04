"""Tune a packed checkpoint: read it and what it was quantized from, write another one of the same size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitsmoe_plugin.base.atomic_output import check_output_directory
from bitsmoe_plugin.base.interruption import kept_unless_finished
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.work_directory import OUTPUT, WorkDirectory, remove, writing
from bitsmoe_plugin.base.workers import refuse_several
from bitsmoe_plugin.calibration.text import load_documents, token_blocks
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.commands.evaluate import check_same_vocabulary, load_for_evaluation, load_reference
from bitsmoe_plugin.commands.quantize import write_checkpoint
from bitsmoe_plugin.commands.tuning_way import settled
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.model_class import check_loadable
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.side_files import side_files
from bitsmoe_plugin.models.streamed_model import load_streamed
from bitsmoe_plugin.models.tokenizer import load_tokenizer
from bitsmoe_plugin.pipeline.descent_progress import begun as begun_in
from bitsmoe_plugin.pipeline.tune_layers import Original
from bitsmoe_plugin.pipeline.tune_scales import Tuning, TuningSettings, check_blocks
from bitsmoe_plugin.pipeline.tuning import tune_by
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


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
    """See ``tuning.tune_by``. ``out`` takes its name at the end, so it is either absent or complete.

    Layers that are finished, and steps through the whole model, are kept in a directory, ``out`` with ".work"
    appended, until all is done: the same call continues there if this one ends early.

    Args:
        model: directory of a packed model.
        reference: directory or hub name of what it was quantized from.
        dataset, calibration_tokens, sequence_length, chat_template_kwargs: as of ``BitsMoEConfig``. With
            those that the model was quantized with, and the same seed, the blocks held out are those that
            were held out then.

    Raises:
        BitsMoEError: bad input, or nothing was better on the blocks held out. Nothing is left behind but
            what was finished.
        Interrupted: Ctrl-C; says how to go on.
    """
    BitsMoEConfig(calibration_tokens=calibration_tokens, sequence_length=sequence_length)  # it checks them
    out, packed_source, origin = Path(out).resolve(), ModelSource.of(model), ModelSource.of(reference)
    refuse_several("a model is tuned")
    check_output_directory(out)
    config = read_config(Path(packed_source.name))
    check_loadable(origin)
    documents = load_documents(dataset, max_tokens=calibration_tokens, sequence_length=sequence_length)
    tokenizer = load_tokenizer(packed_source)
    saved = copy.deepcopy(tokenizer)  # encoding leaves traces, which should not be saved
    beside_weights = side_files(packed_source)
    work = out.with_name(f"{out.name}.work")
    with kept_unless_finished(work):  # from the start: what cannot be written should not show at the end
        begun = _begun(work)
        packed = load_for_evaluation(packed_source)
        blocks = token_blocks(
            documents,
            tokenizer,
            sequence_length=sequence_length,
            max_tokens=calibration_tokens,
            vocab_size=packed.get_input_embeddings().num_embeddings,
            seed=settings.seed,
            chat_template_kwargs=chat_template_kwargs,
        )
        check_blocks(len(blocks), settings)
        config.sequence_length = sequence_length
        settings = settled(settings, origin.config(), config, blocks.numel(), device, begun)
        result = _tuned(packed, origin, blocks, settings, work, device)
        if not result.epoch:
            remove(work)
            raise QuantizationError(
                f"no epoch came closer to {origin.name} on the text held out (KL {result.before:.4f} "
                "before), so nothing was written; give more text (calibration_tokens) or a smaller learning "
                "rate"
            )
        with writing(out):
            partial = work / OUTPUT
            write_checkpoint(packed.to("cpu"), saved, origin.name, dataset, partial, out, beside_weights)
        remove(work)
    return result


def _begun(work: Path) -> str | None:
    """See ``descent_progress.begun``; leaves alone what a quantization with the same ``out`` has finished."""
    directory = WorkDirectory(work)
    if "identity" in directory.state:
        raise directory.damaged("it holds layers of a model that is being quantized")
    return begun_in(directory)


def _tuned(
    packed: Any, origin: ModelSource, blocks: Tensor, settings: TuningSettings, work: Path, device: str
) -> Tuning:
    def original() -> Original:
        _move_all_but_experts(packed, device)
        model, source = load_streamed(origin, device=device)
        check_same_vocabulary(model, packed, origin)
        return Original(model, source)

    def reference() -> nn.Module:
        return load_reference(origin, packed.to(device))  # type: ignore[no-any-return]

    kept = WorkDirectory(work)
    return tune_by(settings, packed, blocks, original=original, reference=reference, directory=kept)


def _move_all_but_experts(model: nn.Module, device: str) -> None:
    for module in model.modules():
        if not isinstance(module, BitsMoEExperts):
            module._apply(lambda tensor: tensor.to(device), recurse=False)
