"""Where the weights of a layer's experts come from when its turn comes.

Quantization reads every layer twice, once in each pass. A model that is in memory has them at hand; one
that is loaded for quantization reads them from its files and drops them again (``models.streamed_experts``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from bitsmoe_plugin.codec.layout import LayerShape, original_dtype
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.models.families import MoELayer, find_moe_layers, layer_shape, read_experts


class ExpertSource(Protocol):
    """The MoE layers of a model and their weights, one layer at a time."""

    layers: list[MoELayer]
    shapes: list[LayerShape]
    dtypes: list[torch.dtype]
    """In which weights and biases of each layer are stored where they are not quantized."""
    files: list[Path]
    """What the weights are read from, layer by layer; empty if they are in memory."""

    def loaded(self, layer: MoELayer) -> AbstractContextManager[ExpertWeights]:
        """While this is entered, the layer's module holds its weights (and is what is yielded made of)."""


class LoadedExperts:
    """Experts that are in memory with the rest of the model."""

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            QuantizationError: no MoE layers, or unknown ones.
        """
        self.layers = find_moe_layers(model)
        self.shapes = [layer_shape(layer.module) for layer in self.layers]
        self.dtypes = [original_dtype(layer.module.down_proj.dtype) for layer in self.layers]
        self.files: list[Path] = []

    @contextmanager
    def loaded(self, layer: MoELayer) -> Iterator[ExpertWeights]:
        """See ``ExpertSource``."""
        yield read_experts(layer.module)


def weights_digest(layer: MoELayer) -> str:
    """SHA-256 over the parameters of a layer's experts module, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(layer.module.named_parameters(recurse=False)):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        flat = parameter.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
