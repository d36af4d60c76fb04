"""The texts of a comparison, tried on their first document before hours are spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitsmoe_plugin.calibration.conversations import check_takes_images, holds_images
from bitsmoe_plugin.calibration.text import load_documents, token_stream
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.processor import load_processor
from bitsmoe_plugin.models.tokenizer import load_tokenizer
from bitsmoe_plugin.pipeline.tune_scales import check_blocks
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings


def check_texts(
    source: ModelSource,
    empty: Any,
    dataset: str,
    evaluation: str,
    readers: Sequence[str],
    chat_template_kwargs: dict[str, Any] | None,
) -> None:
    """Refuse what cannot be read. Conversations with images may calibrate; what is measured on is text.

    Args:
        empty: the model, without weights.
        readers: methods that calibrate on text alone.

    Raises:
        ConfigError: images for a model that takes none, or for one of ``readers``.
        QuantizationError: a text that cannot be read.
    """
    calibration, tokenizer = load_documents(dataset), load_tokenizer(source)
    texts = [load_documents(evaluation)]
    if holds_images(calibration):
        check_takes_images(empty)
        if readers:
            raise ConfigError(
                f"the dataset holds images, and method {readers[0]} calibrates on text alone; leave it out, "
                "or give a dataset without images"
            )
        load_processor(source)
    else:
        texts.insert(0, calibration)
    for documents in texts:
        token_stream(documents, tokenizer, limit=1, chat_template_kwargs=chat_template_kwargs)


def check_tuning_text(source: ModelSource, config: BitsMoEConfig) -> None:
    """Refuse text that the model could be quantized with, but not tuned on.

    Raises:
        ConfigError: it holds images.
        QuantizationError: too little.
    """
    documents, settings = load_documents(config.dataset), TuningSettings.of(config)
    if holds_images(documents):
        raise ConfigError(f"--tune {config.tune}: the dataset holds images, and text alone is tuned on")
    enough = -int(-1 // settings.held_out) * config.sequence_length
    limit = min(enough, config.calibration_tokens or enough)
    stream = token_stream(documents, load_tokenizer(source), limit, config.chat_template_kwargs)
    check_blocks(len(stream) // config.sequence_length, settings)
