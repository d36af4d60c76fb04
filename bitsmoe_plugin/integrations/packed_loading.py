"""What ``from_pretrained`` of a packed model does before weights are loaded."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from bitsmoe_plugin.checkpoint.dense_headers import dense_layers
from bitsmoe_plugin.checkpoint.headers import stored_tensors, verify_headers
from bitsmoe_plugin.checkpoint.manifest import check_shape, packed_spec
from bitsmoe_plugin.checkpoint.model_sizes import check_planned
from bitsmoe_plugin.checkpoint.other_tensors import stored_shapes, verify_others
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.codec.dense import dense_schemes
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.integrations.parallel import SplitLayers, distributed_config, empty_split_layers
from bitsmoe_plugin.models.absent_parameters import stand_for_absent
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.models.files import check_loaded_files
from bitsmoe_plugin.models.layer_names import decoder_layer
from bitsmoe_plugin.runtime.experts import BitsMoEExperts, replace_module


def check_files(model: nn.Module, files: list[str], config: BitsMoEConfig) -> None:
    """Refuse files that do not belong to the checkpoint, or hold other tensors than were recorded.

    Args:
        model: without weights, its experts still the original ones.
        files: none if the model is loaded from a state dict.

    Raises:
        CheckpointError: naming the file or tensor.
    """
    if files:
        check_loaded_files(files, Path(getattr(model.config, "_name_or_path", "")))
        tied = getattr(model, "all_tied_weights_keys", {})
        dense_layers(files, dense_schemes(config.dense))
        verify_others(files, config.other_tensors, config.other_tensors_in_model, tied)


def replace_experts(model: nn.Module, files: list[str], config: BitsMoEConfig) -> SplitLayers | None:
    """Put empty packed experts where the originals are, once manifest and files are seen to fit.

    Args:
        config: its ``layers`` get the names that the layers have in this model.

    Returns:
        what loads the layers of a model that is split among processes; None: it is not.

    Raises:
        CheckpointError: naming the layer or tensor that does not fit.
    """
    spread = distributed_config(model)
    layers = find_moe_layers(model)
    stored = stored_names([layer.name for layer in layers], config)
    surplus = set(config.layers) - set(stored.values())
    if surplus:
        raise CheckpointError(
            f"quantization_config describes {', '.join(sorted(surplus))}, which the model lacks"
        )
    manifest = copy.copy(config)
    config.layers = {name: config.layers[old] for name, old in stored.items()}
    specs = {layer.name: packed_spec(layer.name, config) for layer in layers}
    stored_specs = {stored[name]: spec for name, spec in specs.items()}
    tensors = stored_tensors(files)
    if files:
        verify_headers(tensors, stored_specs)
    for layer in layers:
        check_shape(layer.name, specs[layer.name], layer.module)
        module = BitsMoEExperts(layer.module, specs[layer.name])
        stand_for_absent(module, dict(layer.module.named_parameters(recurse=False)))
        module.drop_original_weights()
        replace_module(model, layer.name, module)
    split = None
    if spread is not None:
        split = empty_split_layers(model, spread, PackedFiles(manifest, stored_specs, tensors), stored)
    if files:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_planned(shapes, stored_shapes(files))
    return split


def stored_names(layers: list[str], config: BitsMoEConfig) -> dict[str, str]:
    """Name of each layer in the model -> its name in the manifest, for those that are there.

    They differ by what stands before the decoder layers where another class loads what was saved.
    """
    by_layer = {decoder_layer(name): name for name in config.layers}
    return {layer: by_layer[decoder_layer(layer)] for layer in layers if decoder_layer(layer) in by_layer}
