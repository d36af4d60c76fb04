"""Parts of a multimodal model that see images or hear, whose experts text does not reach."""

from __future__ import annotations

from typing import Any

from torch import nn

_MODALITIES = ("image", "video", "audio")


def tower_modules(model: Any) -> set[nn.Module]:
    """All modules of the encoders for images, videos and sounds that transformers finds in a model."""
    if not hasattr(model, "get_encoder"):  # no PreTrainedModel
        return set()
    towers = [model.get_encoder(modality=modality) for modality in _MODALITIES]
    # What it returns if there is none (or None: Gemma4 without sounds); and an encoder of text that has the
    # others inside (DiffusionGemma).
    whole = {id(model), id(getattr(model, "base_model", model)), id(model.get_encoder())}
    found = [tower for tower in towers if isinstance(tower, nn.Module) and id(tower) not in whole]
    return {module for tower in found for module in tower.modules()}
