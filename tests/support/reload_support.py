"""What the tests of reloading share: two packed checkpoints of one model, and vLLM's loads and reloads."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_support import small_model, write_random_packed

from bitsmoe_plugin.codec.layout import LayerShape

SHAPE = LayerShape(num_experts=4, hidden_size=64, intermediate_size=64)
PAYLOAD = "bitsmoe_payload"


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Two packed checkpoints of one model with payloads of other sizes, the second damaged, a dense one."""
    paths = {name: folder / name for name in ("first", "second", "damaged", "dense")}
    write_random_packed(paths["first"], SHAPE, 2)
    write_random_packed(paths["second"], SHAPE, 2, seed=10)
    shutil.copytree(paths["second"], paths["damaged"])
    tensors = load_file(paths["damaged"] / "model.safetensors")
    tensors[f"model.layers.1.mlp.experts.{PAYLOAD}"][5] ^= 1
    save_file(tensors, paths["damaged"] / "model.safetensors", metadata={"format": "pt"})
    small_model("qwen3_moe").save_pretrained(paths["dense"])
    return paths


def packed_tensors(directory: Path) -> list[tuple[str, Tensor]]:
    tensors = load_file(directory / "model.safetensors")
    return [(name, tensor) for name, tensor in tensors.items() if ".bitsmoe_" in name]


def started(directory: Path, **options):
    """A model of which vLLM has loaded the weights, as it does at start."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm_layers import Model

    model = Model(directory, **options)
    record_metadata_for_reloading(model)
    model.load_weights(packed_tensors(directory))
    model.process()
    return model


def reload(model, weights: Iterable[tuple[str, Tensor]]) -> None:
    """As vLLM's ``reload_weights`` and its engines of weight transfer do."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def name_engine_model(monkeypatch, directory: Path) -> None:
    from vllm_ext import config

    model = SimpleNamespace(model=str(directory), revision=None, trust_remote_code=False)
    monkeypatch.setattr(config, "engine_model", lambda: model)
