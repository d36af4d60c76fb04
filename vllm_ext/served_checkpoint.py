"""What the layers of an engine know of the checkpoint that it serves."""

from __future__ import annotations

from typing import Protocol

from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.models.gating import GatingForm


class Checkpoint(Protocol):
    """What the engine serves."""

    @property
    def files(self) -> PackedFiles:
        """Opened and checked; another object after a reload that names another checkpoint."""

    def gating(self, name: str) -> GatingForm | None:
        """Of a layer's experts in transformers."""

    def note_loaded(self) -> None:
        """Said when a layer was loaded from it."""
