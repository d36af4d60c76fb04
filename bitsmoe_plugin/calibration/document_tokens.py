"""One document -> its token ids: no padding, no truncation, no special tokens."""

from __future__ import annotations

from typing import Any

from bitsmoe_plugin.calibration.dataset_rows import Chat, Document, checked_text
from bitsmoe_plugin.errors import ConfigError, QuantizationError


def document_tokens(
    document: Document, tokenizer: Any, place: str, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Token ids of a document.

    Args:
        document: a string, a list of token ids, or a conversation.
        tokenizer: of transformers; needed for strings and conversations, else only for what it pads with.
        place: where the document stands, for errors.
        chat_template_kwargs: arguments for the chat template.

    Raises:
        ConfigError: there is no tokenizer, or none with a chat template.
        QuantizationError: the tokenizer or its chat template refuses the document; naming the place.
    """
    if isinstance(document, list):
        return _without_padding(document, tokenizer)
    if tokenizer is None:
        raise QuantizationError("dataset holds text, but there is no tokenizer to read it with")
    if isinstance(document, Chat):
        document = _rendered(document, tokenizer, place, chat_template_kwargs or {})
    try:
        encoded = tokenizer(
            document, add_special_tokens=False, padding=False, truncation=False, verbose=False
        )
    except Exception as error:  # tokenizers raise what they like, code of users' tokenizers too
        raise QuantizationError(
            f"{place}: the tokenizer refuses the text ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return list(encoded["input_ids"])


def _rendered(chat: Chat, tokenizer: Any, place: str, options: dict[str, Any]) -> str:
    if chat.images:
        raise QuantizationError(
            f"{place}: the conversation holds images, and only text is read here; images calibrate a "
            "multimodal model that is quantized, if one of the first conversations has one"
        )
    if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
        raise ConfigError(
            "dataset holds conversations ('messages'), but the tokenizer has no chat template; take "
            "the tokenizer of an instruct model (tokenizer=), give "
            'chat_template_kwargs={"chat_template": "..."}, '
            "or a dataset with 'text'"
        )
    try:
        text = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False, **options)
    except Exception as error:  # templates are programs: they raise on conversations that they do not expect
        raise QuantizationError(
            f"{place}: the chat template refuses it ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return checked_text(text, place)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _without_padding(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids without the padding at their ends, as far as it can be known.

    A token that only pads goes. Where the end-of-text token (or another that means something) pads too, the
    first of several stays: one may be the text's own.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "unk")}
    start, end = 0, len(ids)
    for token, own in ((pad, pad in others), (getattr(tokenizer, "eos_token_id", None), True)):
        if token is None:
            continue
        left = _run(ids[start:end], token)
        start += max(left - own, 0)
        right = _run(ids[start:end][::-1], token)
        end -= max(right - own, 0)
    return ids[start:end]


def _run(ids: list[int], token: int) -> int:
    """How often the token stands at the beginning."""
    return next((index for index, found in enumerate(ids) if found != token), len(ids))
