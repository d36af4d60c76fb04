"""``bitsmoe bench checkpoint``: write a random model of any size, to measure quantization on.

Experts of a layer share directions whose strength falls, as those of trained models do; apart from that the
model is noise. One decoder layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from bitsmoe_plugin.commands.bench.output import Row
from bitsmoe_plugin.errors import ConfigError

_DECAY = 1.5
"""Decades between the strongest and the weakest shared direction of a layer."""
_SCALE = 0.02
"""Standard deviation of weights."""


def qwen3_moe(layers: int, **sizes: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B but for the depth and what ``sizes`` replace."""
    published: dict[str, Any] = {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
    }
    options = {**published, **sizes}
    return Qwen3MoeConfig(num_hidden_layers=layers, norm_topk_prob=True, dtype="bfloat16", **options)


def _experts(layer: int, config: Any, seed: int) -> dict[str, Tensor]:
    """Weights of one layer's experts by the names they have on disk, bfloat16."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    h, i = config.hidden_size, config.moe_intermediate_size
    strength = torch.logspace(0, -_DECAY, h)
    strength *= _SCALE * (h / strength.square().sum()).sqrt()
    # [H, H], for what experts read and for what they write
    read, write = (
        torch.linalg.qr(torch.randn(h, h, generator=generator))[0] * strength[:, None] for _ in range(2)
    )
    tensors = {}
    for expert in range(config.num_experts):
        for name, directions in (("gate_proj", read), ("up_proj", read), ("down_proj", write)):
            weight = torch.randn(i, h, generator=generator) @ directions
            weight = weight.T if name == "down_proj" else weight
            key = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
            tensors[key] = weight.to(torch.bfloat16).contiguous()
    return tensors


def _others(shapes: dict[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """Norms of 1, everything else normal, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if name.endswith("norm.weight")
        else (torch.randn(shape, generator=generator) * _SCALE).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def write_checkpoint(directory: Path, config: Qwen3MoeConfig, seed: int = 0) -> int:
    """Write a model, one file for each decoder layer and one for the rest.

    Returns:
        bytes of its tensors.

    Raises:
        ConfigError: the directory is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items() if ".mlp.experts." not in name}
    files, size = config.num_hidden_layers + 1, 0
    index: dict[str, str] = {}
    for number in range(files):
        prefix = f"model.layers.{number}."
        inside = number < config.num_hidden_layers
        chosen = {
            name: shape
            for name, shape in shapes.items()
            if (name.startswith(prefix) if inside else ".layers." not in name)
        }
        tensors = _others(chosen, seed + number) | (_experts(number, config, seed) if inside else {})
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content, indent=2), encoding="utf-8")
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(directory)
    return size


def measure(args: argparse.Namespace) -> list[Row]:
    """One row: what was written."""
    sizes = {
        "hidden_size": args.hidden_size,
        "moe_intermediate_size": args.intermediate_size,
        "num_experts": args.experts,
        "vocab_size": args.vocab_size,
    }
    config = qwen3_moe(args.layers, **{name: size for name, size in sizes.items() if size is not None})
    size = write_checkpoint(args.directory, config, args.seed)
    if args.tokenizer:
        AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.directory)
    return [{"directory": str(args.directory), "layers": args.layers, "bytes": size}]
