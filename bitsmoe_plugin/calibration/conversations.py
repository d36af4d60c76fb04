"""Conversations with images -> what a multimodal model is called with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from random import Random
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.base.error_lines import one_line
from bitsmoe_plugin.calibration.blocks import ConversationBlocks, Inputs, token_count
from bitsmoe_plugin.calibration.dataset_rows import Chat
from bitsmoe_plugin.calibration.documents import Documents
from bitsmoe_plugin.calibration.text import check_vocabulary
from bitsmoe_plugin.errors import ConfigError, QuantizationError

_IMAGE_TOKENS = ("image_token_id", "image_token_index", "boi_token_id", "eoi_token_id", "vision_end_token_id")
"""Names in config.json of the tokens that stand for images and around them."""


def holds_images(documents: Documents) -> bool:
    """Whether there are images in conversations that were read so far."""
    return any(isinstance(document, Chat) and document.images for document in documents)


def check_takes_images(model: Any) -> None:
    """Refuse images for a model class that has no place for them.

    Raises:
        ConfigError: naming the class.
    """
    if "pixel_values" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(
            f"the dataset holds images, which {type(model).__name__} does not take; load a multimodal model "
            "with AutoModelForMultimodalLM, or give text"
        )


def image_tokens(config: Any) -> set[int]:
    """Ids of the tokens that stand for images, as config.json names them."""
    found = {getattr(config, name, None) for name in _IMAGE_TOKENS}
    return {token for token in found if isinstance(token, int)}


def conversation_blocks(
    documents: Documents,
    processor: Any,
    *,
    sequence_length: int,
    max_tokens: int,
    vocab_size: int,
    tokens_of_images: Collection[int] = (),
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ConversationBlocks:
    """One block of each conversation, in random order, until there are enough tokens.

    Text after the last image is cut at ``sequence_length``. A conversation whose images do not fit into that
    is left out, with a warning.

    Args:
        documents: conversations; of a stream more are read if those that were read are too few.
        processor: of transformers, or one like it.
        max_tokens: at most, but for the last block; tokens of images count.
        tokens_of_images: ids that must not be cut off.
        seed: of the order.
        chat_template_kwargs: arguments for the chat template.

    Raises:
        ConfigError: the processor has no chat template.
        QuantizationError: a conversation that is refused, naming its place; or none fits.
    """
    order = list(range(len(documents)))
    Random(seed).shuffle(order)
    blocks, too_long, done = ConversationBlocks(), [], 0
    while token_count(blocks) < max_tokens:
        if done == len(order):
            if not documents.read_more():
                break
            order += range(len(order), len(documents))
        place = documents.place(order[done])
        inputs = _processed(documents[order[done]], processor, place, chat_template_kwargs or {})
        check_vocabulary(inputs["input_ids"], vocab_size)
        done += 1
        fitting = _cut(inputs, sequence_length, tokens_of_images)
        if fitting is None:
            too_long.append((place, inputs["input_ids"].shape[1]))
        else:
            blocks.append(fitting)
    _tell_too_long(too_long, len(blocks), sequence_length)
    return blocks


def _processed(document: Any, processor: Any, place: str, options: dict[str, Any]) -> Inputs:
    """What the processor makes of a conversation: tensors for the model."""
    if not isinstance(document, Chat):
        raise QuantizationError(f"{place} is no conversation, others before are; give 'messages' alone")
    own = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not own and not options.get("chat_template"):
        raise ConfigError(
            "dataset holds conversations ('messages'), but the processor has no chat template; take that of "
            'an instruct model (tokenizer=), or give chat_template_kwargs={"chat_template": "..."}'
        )
    try:
        found = processor.apply_chat_template(
            document.messages,
            tools=document.tools,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        )
    except Exception as error:  # templates and decoders of images raise what they like
        raise QuantizationError(
            f"{place}: the processor refuses it ({type(error).__name__}: {one_line(error)})"
        ) from error
    return _tensors(dict(found), place)


def _tensors(found: dict[str, Any], place: str) -> Inputs:
    odd = sorted(name for name, value in found.items() if not isinstance(value, Tensor))
    ids = found.get("input_ids")
    if odd or not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        raise QuantizationError(
            f"{place}: the processor returns {', '.join(odd) or 'input_ids'} in another form than tensors "
            "[1, ...], which cannot be carried through the model"
        )
    return {name: tensor.cpu() for name, tensor in found.items()}


def _cut(inputs: Inputs, length: int, tokens_of_images: Collection[int]) -> Inputs | None:
    """The inputs with at most ``length`` tokens, None if images would lose some of theirs."""
    ids = inputs["input_ids"]
    total = ids.shape[1]
    if total <= length:
        return inputs
    by_token = {name for name, tensor in inputs.items() if tensor.shape[:2] == (1, total)}
    if by_token != inputs.keys():  # the others are of images
        wanted = torch.tensor(sorted(tokens_of_images), dtype=ids.dtype, device=ids.device)
        of_images = torch.isin(ids[0], wanted)
        if "mm_token_type_ids" in inputs:
            of_images |= inputs["mm_token_type_ids"][0].ne(0)
        if not bool(of_images.any()) or bool(of_images[length:].any()):
            return None
    return {name: tensor[:, :length] if name in by_token else tensor for name, tensor in inputs.items()}


def _tell_too_long(too_long: list[tuple[str, int]], blocks: int, length: int) -> None:
    if not too_long:
        return
    place, tokens = too_long[0]
    longest = max(count for _, count in too_long)
    text = (
        f"{len(too_long)} conversations with images are longer than sequence_length {length}, such as "
        f"{place} with {tokens} tokens"
    )
    cure = f"a sequence_length of {longest} takes all of them; smaller images have fewer tokens"
    if not blocks:
        raise QuantizationError(f"{text}; none fits. {cure}")
    warnings.warn(f"{text}; they are left out ({blocks} are taken). {cure}", stacklevel=3)
