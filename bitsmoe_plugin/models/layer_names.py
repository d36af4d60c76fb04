"""Names of decoder layers and packed tensors, which differ between modules, files and classes."""

from __future__ import annotations

import re

PREDICTION = re.compile(r"(^|[._])(mtp|nextn)")
"""In the names of layers for multi-token prediction, of all families that do not number them."""


def tensor_key(name: str) -> tuple[str, str]:
    """(decoder layer, buffer) of a packed tensor's name.

    Some families rename what stands between the two on saving (Mixtral: ``mlp`` in memory,
    ``block_sparse_moe`` on disk), so names of modules and of stored tensors are compared by this.
    """
    match = re.fullmatch(r"(.*\.\d+)\..*\.(bitsmoe_\w+)", name)
    return (match[1], match[2]) if match else (name, "")


def stored_key(name: str) -> tuple[str, str]:
    """(decoder layer, buffer) of a packed tensor's name, without what stands before the decoder layers.

    That depends on the class that saved or loads a model (``model.layers``, ``model.language_model.layers``;
    ``layers`` of the base model alone). A model has one list of decoder layers with experts.
    """
    layer, buffer = tensor_key(name)
    return ".".join(layer.split(".")[-2:]) if buffer else layer, buffer


def decoder_layer(name: str) -> str:
    """The same of the path of an experts module: ``layers.3`` of ``model.layers.3.mlp.experts``."""
    return stored_key(f"{name}.bitsmoe_payload")[0]
