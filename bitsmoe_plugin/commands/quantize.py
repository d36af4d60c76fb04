"""``bitsmoe quantize``: a model's directory or name in, the directory of the packed model out."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.atomic_output import check_output_directory, publish
from bitsmoe_plugin.base.error_lines import working_on
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.work_directory import OUTPUT, has_progress, locked, remove, staging, writing
from bitsmoe_plugin.base.workers import Workers
from bitsmoe_plugin.codec.backends import refuse_slow
from bitsmoe_plugin.commands.model_card import write_model_card
from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError, QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.models.low_precision import method_of, stored_settings
from bitsmoe_plugin.models.model_class import empty_model, load_model
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.processor import SavedProcessor, is_processor
from bitsmoe_plugin.models.side_files import copy_side_files, side_files
from bitsmoe_plugin.models.tokenizer import find_tokenizer, given_tokenizer


@known_state()
def quantize_to_directory(
    model: str | ModelSource, out: Path, config: BitsMoEConfig, device: str = "cpu"
) -> None:
    """Quantize a saved model and write it packed, with its tokenizer, its other files and a model card.

    Finished layers are kept in a work directory (``config.work_dir``, or ``out`` with ".work" appended)
    until all is done: the same call continues there if this one ends early. ``out`` takes its name at the
    end, so it is either absent or complete. Of several processes (see ``workers``) the first one writes.

    Args:
        model: directory or hub name, or both with what else it takes to find it and its tokenizer.
        device: what the model is loaded to, and quantized on; see ``devices.choose_device``.

    Raises:
        BitsMoEError: bad input. Nothing is left behind but layers that were finished.
        Interrupted: Ctrl-C; says how to go on.
    """
    workers = Workers.present()
    with workers.together():
        config = BitsMoEConfig.checked_copy(config)
        _quantize_to_directory(ModelSource.of(model), Path(out).resolve(), config, device, workers)


def _quantize_to_directory(
    origin: ModelSource, out: Path, config: BitsMoEConfig, device: str, workers: Workers
) -> None:
    """What each of ``workers`` does of it; ``config`` is changed."""
    refuse_slow(device, config.allow_slow)
    workers.from_main(lambda: check_output_directory(out))
    workers.from_main(lambda: _check_unquantized(origin))
    if device != "cpu" and find_spec("accelerate") is None:
        raise ConfigError(f"to load to {device}, transformers needs accelerate; pip install accelerate")
    tokenizer = find_tokenizer(origin)  # first of all: it may be refused
    beside_weights = workers.from_main(lambda: side_files(origin))
    config.tokenizer = _reader(config.tokenizer, tokenizer, origin)
    options: dict[str, Any] = {"quantization_config": config}
    if device != "cpu":
        options["device_map"] = {"": device}
    # Beside ``out``, so that a rename within one file system publishes it, wherever the layers are kept.
    beside = out.with_name(f"{out.name}.work")
    config.work_dir = work = Path(config.work_dir or beside)
    if not workers.main:  # it takes part, the first process writes
        load_model(origin, **options)
        return
    with locked(work), staging(beside):
        try:
            quantized = load_model(origin, **options)
            with writing(out):
                partial, dataset = beside / OUTPUT, config.dataset
                write_checkpoint(quantized, tokenizer, origin.name, dataset, partial, out, beside_weights)
        except BaseException as error:
            if not has_progress(work):
                remove(work)
                if isinstance(error, Interrupted):  # which says that there is something to go on with
                    raise KeyboardInterrupt from error
            elif isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
                raise Interrupted(
                    f"stopped; {work} holds the layers that are finished. Start the same again to go on"
                ) from error
            raise
        remove(work)


def _reader(given: Any, own: Any, origin: ModelSource) -> Any:
    """What reads the dataset: what the option gives, else the model's tokenizer or processor."""
    if given is None:  # a copy: encoding leaves traces, which should not be saved
        return None if own is None else SavedProcessor(copy.deepcopy(own), origin)
    if is_processor(given):
        return given
    tokenizer = given_tokenizer(given, origin)
    return SavedProcessor(tokenizer, origin.elsewhere(given)) if isinstance(given, (str, Path)) else tokenizer


def _check_unquantized(origin: ModelSource) -> None:
    """Refuse what transformers would load as it is, with no more than a warning, to be saved once more; and
    a model whose experts cannot be quantized."""
    with working_on(f"config.json of {origin.name}"):
        config = origin.config()
    found = stored_settings(config)
    if found is not None and method_of(found) == QUANT_METHOD:
        raise QuantizationError(
            f"{origin.name} is quantized already (quant_method {QUANT_METHOD!r}); the model that it was made "
            "from is needed"
        )
    find_moe_layers(empty_model(config))


def write_checkpoint(
    quantized: Any,
    tokenizer: Any,
    model: str,
    dataset: Any,
    partial: Path,
    out: Path,
    beside_weights: Iterable[Path] = (),
) -> None:
    """Save at ``partial``, which then becomes ``out``.

    Args:
        tokenizer: of what was quantized; None: it has none, and there is a warning.
        model: directory or hub name of what was quantized.
        dataset: what it was calibrated on.
        beside_weights: more files of it, see ``side_files``.
    """
    if partial.exists():  # of a run that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    quantized.save_pretrained(partial)
    if tokenizer is None:
        warnings.warn(f"no tokenizer saved: none found at {model}", stacklevel=3)
    else:
        tokenizer.save_pretrained(partial)
    copy_side_files(beside_weights, partial)
    write_model_card(partial, model, dataset)
    publish(partial, out)
