"""One row of any dataset -> one document: text, token ids without their padding, or a conversation."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmoe_plugin.calibration.message_parts import Parts
from bitsmoe_plugin.errors import QuantizationError

COLUMNS = ("text", "input_ids", "messages")
"""What a document is read from; the first that a dataset has."""
BESIDE = {"input_ids": ("attention_mask",), "messages": ("tools", "images")}
"""Columns that belong to one of them."""
_MIXED = "dataset mixes types or holds something else than strings, lists of token ids or rows with such"


@dataclass(frozen=True)
class Chat:
    """A conversation, which the chat template of a tokenizer turns into text.

    Attributes:
        messages: each with a ``role`` and, as a rule, ``content``.
        tools: descriptions of functions that the template is given, if there are any.
        images: how many there are in the messages.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    images: int = 0


Document = str | list[int] | Chat


def choose_column(names: Any) -> str:
    """The column that documents are read from.

    Raises:
        QuantizationError: naming the columns that are there.
    """
    found = next((column for column in COLUMNS if column in names), None)
    if found is None:
        raise QuantizationError(
            f"dataset has the columns {reprlib.repr(list(names))}; one named 'text' or 'input_ids' is "
            "needed, or 'messages' with conversations"
        )
    return found


class RowReader:
    """Reads the rows of one dataset: all from the same column, all to documents of one type.

    Attributes:
        column: that rows which are mappings are read from; None: chosen at the first of them.

    Args:
        folder: that paths of images are relative to; None: the current one.
    """

    def __init__(self, column: str | None = None, folder: Path | None = None) -> None:
        self.column = column
        self._folder = folder
        self._type: type | None = None

    def read(self, item: Any, place: str) -> Document:
        """One document.

        Args:
            item: text, token ids, a conversation (list of messages), or a mapping with one of ``COLUMNS``.
            place: where it stands, for errors.

        Raises:
            QuantizationError: naming the place.
        """
        document = self._row(item, place) if isinstance(item, Mapping) else self._item(item, place)
        if self._type is None:
            self._type = type(document)
        if type(document) is not self._type:
            raise QuantizationError(
                f"{place} is a {type(document).__name__}, those before are of type {self._type.__name__}; "
                f"{_MIXED}"
            )
        return document

    def _row(self, row: Mapping[str, Any], place: str) -> Document:
        if self.column is None:
            self.column = choose_column([name for name in row if row[name] is not None] or list(row))
        value = row.get(self.column)
        if self.column == "text":
            if not isinstance(value, str):
                raise QuantizationError(
                    f"{place}: an object with a string 'text' is needed, not {reprlib.repr(value)}"
                )
            return checked_text(value, place)
        if self.column == "messages":
            tools, images = (row.get(name) for name in BESIDE["messages"])
            return _chat(value, tools, Parts(place, self._folder, images), place)
        ids = token_ids(value, f"{place}: 'input_ids'")
        return _unpadded(ids, row.get("attention_mask"), place)

    def _item(self, item: Any, place: str) -> Document:
        if isinstance(item, Chat):
            return item
        if isinstance(item, str):
            return checked_text(item, place)
        if isinstance(item, (list, tuple)) and item and isinstance(item[0], Mapping):
            return _chat(item, None, Parts(place, self._folder, None), place)
        return token_ids(item, place)


def checked_text(text: str, place: str) -> str:
    """The text, if it can be encoded.

    Raises:
        QuantizationError: it holds half of a surrogate pair, which is no character; naming the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QuantizationError(
            f"{place}: character {error.start} is {text[error.start]!a}, a lone surrogate, which no "
            "tokenizer reads; leave the text out, or repair it where it was decoded"
        ) from error
    return text


def _plain(values: Any) -> Any:
    """Lists for tensors and arrays; the only row of a batch of one."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (list, tuple)) and len(values) == 1:
        only = values[0].tolist() if hasattr(values[0], "tolist") else values[0]
        return only if isinstance(only, (list, tuple)) else values
    return values


def token_ids(values: Any, place: str) -> list[int]:
    """Plain integers of a list, tuple, tensor or array ``[tokens]`` or ``[1, tokens]``.

    Raises:
        QuantizationError: something else is in it, or a negative number; naming the place.
    """
    values = _plain(values)
    if not isinstance(values, (list, tuple)):
        raise QuantizationError(f"{place} is {reprlib.repr(values)}; {_MIXED}")
    if not all(type(value) is int for value in values):
        values = [_token_id(value, place) for value in values]
    if values and min(values) < 0:
        raise QuantizationError(
            f"{place} holds {min(values)}, which is no token id; they start at 0. Are these labels?"
        )
    return list(values)


def _token_id(value: Any, place: str) -> int:
    number = value.tolist() if hasattr(value, "tolist") else value  # of numpy, or a tensor without dimensions
    if isinstance(number, (list, tuple)):
        raise QuantizationError(
            f"{place} holds lists in a list; a list of token ids per document is needed, no batch. {_MIXED}"
        )
    if isinstance(number, (bool, str)) or not hasattr(number, "__index__"):
        raise QuantizationError(f"{place} holds {reprlib.repr(number)}, which is no token id; {_MIXED}")
    return operator.index(number)


def _unpadded(ids: list[int], mask: Any, place: str) -> list[int]:
    """The ids without those whose ``attention_mask`` is 0, wherever they are."""
    if mask is None:
        return ids
    mask = _plain(mask)
    if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
        size = len(mask) if isinstance(mask, (list, tuple)) else reprlib.repr(mask)
        raise QuantizationError(
            f"{place}: 'attention_mask' has {size} values and 'input_ids' {len(ids)}; one for each is needed"
        )
    mask = [value.tolist() if hasattr(value, "tolist") else value for value in mask]
    if not all(isinstance(value, (bool, int, float)) and value >= 0 for value in mask):
        raise QuantizationError(
            f"{place}: 'attention_mask' is {reprlib.repr(list(mask))}; needed are 0 for padding, 1 for tokens"
        )
    return [token for token, seen in zip(ids, mask, strict=True) if seen]


def _chat(messages: Any, tools: Any, parts: Parts, place: str) -> Chat:
    messages = _plain(messages) if hasattr(messages, "tolist") else messages
    sound = isinstance(messages, (list, tuple)) and len(messages) > 0
    if not sound or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise QuantizationError(
            f"{place}: 'messages' is {reprlib.repr(messages)}; a list of objects like "
            '{"role": "user", "content": "..."} is needed'
        )
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise QuantizationError(
            f"{place}: 'tools' is {reprlib.repr(tools)}; a list of descriptions of functions is needed"
        )
    # Datasets give every message the keys of all others, without a value.
    given = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
    for message in given:
        if "content" in message:
            message["content"] = parts.read(message["content"])
    parts.finish()
    return Chat(given, list(tools) if tools else None, parts.count)
