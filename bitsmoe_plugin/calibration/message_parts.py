"""Contents of messages that are lists of parts: text, and images wherever they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitsmoe_plugin.errors import QuantizationError

_WHERE = ("image", "path", "url", "base64")
"""Keys of a part that is an image, as processors of transformers read them."""

_REFUSED = ("video", "audio")


class Parts:
    """Reads the parts of one conversation.

    Args:
        place: where the conversation stands, for errors.
        folder: that paths of images are relative to; None: the current one.
        images: of the conversation's row, for parts that hold none themselves.
    """

    def __init__(self, place: str, folder: Path | None, images: Any) -> None:
        self._place, self._folder = place, folder
        self._given = images is not None
        self._images: Iterator[Any] = iter(images if isinstance(images, (list, tuple)) else [])
        self.count = 0

    def read(self, content: Any) -> Any:
        """Content of a message with every image in its place.

        Raises:
            QuantizationError: a part of another kind than text and images, or an image that is nowhere.
        """
        if not isinstance(content, (list, tuple)):
            return content
        return [self._part(part) for part in content]

    def finish(self) -> None:
        """To be called at the end.

        Raises:
            QuantizationError: the row has images that no message has a place for.
        """
        left = sum(1 for _ in self._images)
        if self._given and left:
            raise QuantizationError(
                f"{self._place}: 'images' holds {left} more than the messages have parts of type 'image' for"
            )

    def _part(self, part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        # Datasets give every part the keys of all others, without a value.
        kept = {key: value for key, value in part.items() if value is not None}
        kind = str(kept.get("type", ""))
        if any(name in kind for name in _REFUSED):
            raise QuantizationError(
                f"{self._place}: a message has a part of type {kind!r}; calibration takes text and images, "
                "no video and no audio"
            )
        return self._image(kept) if "image" in kind else kept

    def _image(self, part: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        url = part.get("image_url")
        if url is not None:  # as servers take it
            part = {"type": "image", "url": url.get("url") if isinstance(url, Mapping) else url}
        found = next((key for key in _WHERE if key in part), None)
        value = part[found] if found else next(self._images, None)
        if value is None:
            raise QuantizationError(
                f"{self._place}: a part of type 'image' says nowhere where the image is; give it as 'path', "
                "'url' or 'image', or in a column 'images'"
            )
        others = {key: part[key] for key in part if key not in _WHERE}
        return {**others, found if found in ("url", "base64") else "image": self._located(value)}

    def _located(self, value: Any) -> Any:
        """A path relative to the dataset's file as an absolute one; anything else as it is."""
        if isinstance(value, Mapping):  # as datasets keep an image that is not decoded
            return value.get("bytes") or self._located(value.get("path"))
        if isinstance(value, Path):
            value = str(value)
        if self._folder is None or not isinstance(value, str) or len(value) > 4096 or ":" in value[:8]:
            return value
        path = self._folder / value
        return str(path) if path.is_file() else value
