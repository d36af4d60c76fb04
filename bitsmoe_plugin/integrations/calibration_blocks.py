"""Blocks of calibration tokens for a model that ``from_pretrained`` is about to load."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitsmoe_plugin.calibration.blocks import Blocks
from bitsmoe_plugin.calibration.conversations import (
    check_takes_images,
    conversation_blocks,
    holds_images,
    image_tokens,
)
from bitsmoe_plugin.calibration.coverage import wanted_tokens
from bitsmoe_plugin.calibration.dataset_rows import Document
from bitsmoe_plugin.calibration.documents import load_documents
from bitsmoe_plugin.calibration.text import token_blocks
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.processor import SavedProcessor, is_processor, load_processor
from bitsmoe_plugin.models.routing import experts_per_token
from bitsmoe_plugin.models.tokenizer import (
    UntrustedCodeError,
    given_tokenizer,
    has_tokenizer_files,
    load_tokenizer,
)


def calibration_blocks(
    model: Any, config: BitsMoEConfig, files: Sequence[str] | None, shapes: Sequence[LayerShape]
) -> Blocks:
    """Read the dataset of ``config`` with the tokenizer or, if there are images, the processor of the model.

    If it does not say how many tokens are used, that is written into it.

    Args:
        model: of transformers; its weights need not be there.
        files: of its weights. The tokenizer is that beside them, whatever options they were found by.
        shapes: of its MoE layers.

    Returns:
        ``[blocks, sequence_length]`` int64, see ``token_blocks``; or see ``conversation_blocks``.

    Raises:
        ConfigError: text, and no tokenizer to read it with; or images that the model does not take.
        QuantizationError: text that cannot be read, or too little of it.
    """
    if config.calibration_tokens is None:
        config.calibration_tokens = wanted_tokens(shapes, experts_per_token(model.config))
    with torch.device("cpu"):  # models without weights are made on another one
        documents = load_documents(
            config.dataset, max_tokens=config.calibration_tokens, sequence_length=config.sequence_length
        )
        name = model.config._name_or_path
        options: dict[str, Any] = {
            "sequence_length": config.sequence_length,
            "max_tokens": config.calibration_tokens,
            "vocab_size": model.get_input_embeddings().num_embeddings,
            "seed": config.seed,
            "chat_template_kwargs": config.chat_template_kwargs,
        }
        if holds_images(documents):
            check_takes_images(model)
            processor = _processor(name, files, config.tokenizer)
            found = image_tokens(model.config)
            return conversation_blocks(documents, processor, tokens_of_images=found, **options)
        return token_blocks(documents, _tokenizer(name, files, config.tokenizer, documents[0]), **options)


def _processor(name: str, files: Sequence[str] | None, given: Any) -> Any:
    """The processor given, or that of the model."""
    if isinstance(given, SavedProcessor):
        return given.load()
    if is_processor(given):
        return given
    if given is not None and not isinstance(given, (str, Path)):
        raise ConfigError(
            f"the dataset holds images, but tokenizer is a {type(given).__name__}; give the processor "
            "(AutoProcessor), or leave it out"
        )
    source = ModelSource.of_files(name, files) if name or files else None
    if given is None and source is None:
        raise ConfigError(
            "the dataset holds images, but the model was not loaded from files where its processor would be; "
            "give tokenizer= with the processor (AutoProcessor)"
        )
    return load_processor(
        source.elsewhere(given) if source and given else source or ModelSource(name=str(given))
    )


def _tokenizer(name: str, files: Sequence[str] | None, given: Any, document: Document) -> Any:
    """The tokenizer given, or else that of the model; None where there is none and none is needed."""
    source = ModelSource.of_files(name, files) if name or files else None
    if given is not None:
        return given_tokenizer(given, source)
    reason = "the model was not loaded from files"
    if source is not None:
        try:
            return load_tokenizer(source)
        except UntrustedCodeError:
            raise
        except (OSError, ValueError) as error:
            reason = f"at {source.name} there is none ({' '.join(str(error).split())})"
    if isinstance(document, list) and source is not None and not has_tokenizer_files(source):
        return None
    if isinstance(document, list):
        warnings.warn(
            f"no tokenizer: {reason}; documents of token ids are joined without an end-of-text token, and "
            "padding without an attention_mask is not recognised",
            stacklevel=2,
        )
        return None
    raise ConfigError(
        f"BitsMoEConfig: dataset holds text, but no tokenizer was found: {reason}. Save the model's "
        "tokenizer with it, or give tokenizer= (on the command line: --option tokenizer=DIR). A token that "
        "only from_pretrained was given is not seen here: set HF_TOKEN, or give the tokenizer itself"
    )
