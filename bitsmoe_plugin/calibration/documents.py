"""Documents of any accepted dataset, all of it or, of a stream, as much as is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from bitsmoe_plugin.calibration.dataset_files import read_file
from bitsmoe_plugin.calibration.dataset_rows import BESIDE, Chat, Document, RowReader, choose_column
from bitsmoe_plugin.errors import QuantizationError

DEFAULT_TOKENS = 131_072
_CHARACTERS = 4
"""Per token, in most languages and tokenizers at most."""
_WITHOUT_TEXT = 10_000
"""Rows in a row that may be empty before a stream is given up."""
_ALLOWED = (
    "list of strings, list of token id lists, list of rows with 'text', 'input_ids' or 'messages', "
    "an iterator of such, a datasets.Dataset, or a path to a .txt or .jsonl file"
)


class Documents(list[Document]):
    """Documents that were read, and where each stands.

    Of a stream (an ``IterableDataset``, an iterator) only the beginning is read; ``read_more`` goes on.

    Attributes:
        domains: one for each document of a .jsonl file ("all" where it names none); empty for other datasets.
        is_stream: whether it is not known how many there are.
    """

    def __init__(
        self, items: Iterable[Any], reader: RowReader, place: Callable[[int], str], is_stream: bool = False
    ) -> None:
        super().__init__()
        self._items, self._reader, self._place = iter(items), reader, place
        self.is_stream = is_stream
        self.domains: list[str] = []
        self._budget = 0

    def place(self, index: int) -> str:
        """Where a document stands, for errors."""
        return self._place(index)

    def read(self, characters: int | None = None, most: int | None = None) -> bool:
        """Read on; returns whether there was anything left.

        Args:
            characters: stop after documents with so many; None: read all.
            most: of them that count of one document.

        Raises:
            QuantizationError: a row cannot be read; or a stream goes on and on without text.
        """
        before, found, empty = len(self), 0, 0
        while characters is None or found < characters:
            item = next(self._items, self)
            if item is self:
                break
            document = self._reader.read(item, self.place(len(self)))
            self.append(document)
            size = _size(document)
            empty = 0 if size else empty + 1
            if characters is not None and empty == _WITHOUT_TEXT:
                raise QuantizationError(f"dataset has {empty} documents without text, one after the other")
            found += size if most is None else min(size, most)
        return len(self) > before

    def read_ahead(self, tokens: int, sequence_length: int) -> None:
        """Read documents with about twice so many tokens, if one sequence is taken of each.

        Twice, so that there is a choice, and for text with more characters per token than usual.
        """
        self._budget, self._most = 2 * _CHARACTERS * tokens, _CHARACTERS * sequence_length
        self.read(self._budget, self._most)

    def read_more(self) -> bool:
        """Of a stream as much as there is so far; returns whether there was anything left."""
        if not self.is_stream:
            return False
        found = self.read(self._budget, self._most)
        self._budget *= 2
        return found


def _size(document: Document) -> int:
    """Characters, or what token ids stand for."""
    if isinstance(document, Chat):
        return sum(_content_size(message.get("content")) for message in document.messages)
    return len(document) if isinstance(document, str) else _CHARACTERS * len(document)


def _content_size(content: Any) -> int:
    """Of a message that is a list of parts, their text, and something for each image, whose size is open."""
    if isinstance(content, list):
        return sum(len(str(part.get("text", ""))) + 1 for part in content)
    return len(str(content or ""))


def load_documents(
    dataset: Any, *, max_tokens: int = DEFAULT_TOKENS, sequence_length: int = 512
) -> Documents:
    """Documents of any accepted dataset, each a string, a list of token ids or a ``Chat``.

    Padding is left out: token ids whose ``attention_mask`` is 0.

    Args:
        dataset: list of strings, list of token id lists, a ``datasets`` dataset, streamed or not, with a
            column ``text``, ``input_ids`` or ``messages``, a list of such rows, an iterator over any of
            these, or a path to a .txt (one document) or .jsonl file (one such row per line).
        max_tokens, sequence_length: what will be used of it, in sequences of which length. Of a stream, which
            may have no end, documents for about twice as many tokens are read, and more only if that turns
            out to be too few (``token_blocks``).

    Raises:
        QuantizationError: of another type, unreadable, or empty; of a row, naming file and line or the index.
    """
    if isinstance(dataset, (str, Path)):
        documents = _of_file(Path(dataset))
    else:
        items, reader = _rows(dataset)
        stream = not _has_length(items)
        place = "document {} of the stream (from 0)" if stream else "dataset[{}]"
        documents = Documents(items, reader, place.format, stream)
        if stream:
            documents.read_ahead(max_tokens, sequence_length)
        else:
            documents.read()
    if not any(documents):
        raise QuantizationError("dataset is empty; give at least some thousand tokens of text")
    return documents


def _of_file(path: Path) -> Documents:
    items, places = read_file(path)
    documents = Documents(items, RowReader(folder=path.parent), places.__getitem__)
    documents.read()
    if path.suffix.lower() == ".jsonl":
        documents.domains = [str(row.get("domain", "all")) for row in items]
    return documents


def _rows(dataset: Any) -> tuple[Iterable[Any], RowReader]:
    """What to iterate over, with a length if that is known, and how its rows are read."""
    more = ""
    if isinstance(dataset, Mapping):
        _refuse_splits(dataset)
        more = ". Of columns: datasets.Dataset.from_dict(dataset)"
    elif hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
        return _columns(dataset)
    elif hasattr(dataset, "tolist"):  # tensors, arrays and series
        values = dataset.tolist()
        if isinstance(values, list):
            return values, RowReader()
    # A table iterates over the names of its columns, a set in an order of its own.
    elif isinstance(dataset, Iterable) and not isinstance(dataset, Set) and not hasattr(dataset, "columns"):
        return dataset, RowReader()
    raise QuantizationError(f"dataset is a {type(dataset).__name__}; allowed: {_ALLOWED}{more}")


def _refuse_splits(dataset: Mapping[Any, Any]) -> None:
    if dataset and all(hasattr(split, "column_names") for split in dataset.values()):
        names = [repr(name) for name in dataset]
        raise QuantizationError(
            f"dataset is a {type(dataset).__name__} with the splits {', '.join(names)}; give one of them, "
            f"like dataset[{names[0]}]"
        )


def _columns(dataset: Any) -> tuple[Iterable[Any], RowReader]:
    """Rows of a ``datasets`` dataset as plain Python, of the columns that count.

    Tensors, arrays and tables (``with_format``) are but other views of the same rows; a transform of the
    user's (``with_transform``) makes other ones, and stays.
    """
    form = getattr(dataset, "format", None) or {}
    if form.get("type") == "custom":
        return dataset, RowReader()
    if not _has_length(dataset):
        names = dataset.column_names  # None: known when the first row is read
        return dataset.with_format(None), RowReader(choose_column(names) if names else None)
    if not len(dataset):
        return [], RowReader()
    column = choose_column(form.get("columns") or dataset.column_names)
    wanted = [name for name in dataset.column_names if name in (column, *BESIDE.get(column, ()))]
    return dataset.with_format(None, columns=wanted), RowReader(column)


def _has_length(items: Any) -> bool:
    try:
        len(items)
    except TypeError:  # loaders have the method, and raise if what they load from lacks it
        return False
    return True
