"""Checkpoints in low precision, made of an unquantized one as the programs do that publish them.

FP8 and MXFP4 in plain torch; what compressed-tensors stores, by that library.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsmoe_plugin.models.files import INDEX, SINGLE

Tensors = dict[str, Tensor]
BLOCK = (16, 16)
_FP8 = torch.float8_e4m3fn
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def rewrite(path: Path, change: Callable[[Tensors], Any], settings: dict[str, Any] | None = None) -> None:
    """Change a checkpoint's tensors, in place or into others, and its quantization_config if one is given."""
    places: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        changed = change(tensors)
        tensors = changed if isinstance(changed, dict) else tensors
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    if (path / INDEX).is_file():
        write_index(path, places)
    if settings is not None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def write_index(path: Path, places: dict[str, str]) -> None:
    """The index of a checkpoint in several files."""
    size = sum(t.nbytes for file in set(places.values()) for t in load_file(path / file).values())
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))


def in_two_files(path: Path) -> None:
    """Move all scales of a checkpoint into a file of their own."""
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    places = {name: f"model-0000{1 + ('scale' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, path / file, {"format": "pt"})
    write_index(path, places)


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether publishers quantize a stored tensor: all linear layers but head and router."""
    return tensor.dim() == 2 and re.search(r"(proj|_mqa|w[123])\.weight$", name) is not None


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weight ``[rows, columns]`` in FP8 and its scales per block, of which the last may not be whole."""
    (rows, columns), (height, width) = weight.shape, block
    grid = (-(-rows // height), -(-columns // width))
    whole = torch.zeros(grid[0] * height, grid[1] * width)
    whole[:rows, :columns] = weight.float()
    blocks = whole.view(grid[0], height, grid[1], width)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-9) / 448
    values = (blocks / scales[:, None, :, None]).reshape(whole.shape)
    return values[:rows, :columns].to(_FP8), scales


def fp8(
    path: Path, out: Path, block: tuple[int, int] | None = BLOCK, scale: str = "weight_scale_inv"
) -> Path:
    """FP8 in blocks, or per tensor (None), as DeepSeek, Qwen and others publish it."""

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")) and block:
                experts = [fp8_blocks(expert, block) for expert in tensor]
                found[name] = torch.stack([weight for weight, _ in experts])
                found[f"{name}_scale_inv"] = torch.stack([scales for _, scales in experts])
            elif is_linear(name, tensor):
                found[name], scales = fp8_blocks(tensor, block or tuple(tensor.shape))
                found[f"{name.removesuffix('weight')}{scale}"] = scales if block else scales[0, 0]
            else:
                found[name] = tensor
        return found

    shutil.copytree(path, out)
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": block and list(block),
    }
    rewrite(out, change, settings)
    return out


def mxfp4(path: Path, out: Path) -> Path:
    """MXFP4 of fused, transposed experts, as GPT-OSS is published."""

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, 32))
                exponents = (groups.abs().amax(-1) / 6).clamp(min=2.0**-100).log2().ceil()
                values = groups / exponents.exp2().unsqueeze(-1)
                codes = (values.abs().unsqueeze(-1) - _FP4).abs().argmin(-1) + 8 * (values < 0)
                found[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
                found[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
            else:
                found[name] = tensor
        return found

    shutil.copytree(path, out)
    rewrite(out, change, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return out


def scheme(kind: str, targets: tuple[str, ...] = ("Linear",), **changes: Any) -> dict[str, Any]:
    """A config group of compressed-tensors: "fp8 tensor", "fp8 channel", "int4" in groups of 16."""
    if kind.startswith("fp8"):
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": kind.partition(" ")[2]}
    else:
        weights = {"num_bits": int(kind[3:]), "type": "int", "strategy": "group", "group_size": 16}
    form = "float-quantized" if kind.startswith("fp8") else "pack-quantized"
    return {"targets": list(targets), "weights": {"symmetric": True, **weights, **changes}, "format": form}


def compressed(path: Path, out: Path, *groups: dict[str, Any]) -> Path:
    """What compressed-tensors makes of linear layers; the first group whose target is in the name, or all."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    schemes = [QuantizationScheme.model_validate(group) for group in groups]

    def matches(made: Any, name: str) -> bool:
        return any(t == "Linear" or t.removeprefix("re:.*").rstrip(".*") in name for t in made.targets)

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            made = next((s for s in schemes if is_linear(name, tensor) and matches(s, name)), None)
            if made is None:
                found[name] = tensor
                continue
            args = made.weights
            parts = {
                "tensor": (1, -1),
                "channel": (len(tensor), -1),
                "group": (len(tensor), -1, args.group_size),
            }
            grouped = tensor.reshape(parts[args.strategy])
            found_scale, found_zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            shape = {"tensor": (1,), "channel": (-1, 1), "group": tuple(found_scale.shape)}[args.strategy]
            scale, zero = found_scale.reshape(shape), found_zero.reshape(shape)
            compressor = BaseCompressor.get_value_from_registry(made.format)
            stored = {"weight": tensor, "weight_scale": scale.to(tensor.dtype), "weight_zero_point": zero}
            base = name.removesuffix("weight")
            found |= {f"{base}{part}": value for part, value in compressor.compress(stored, made).items()}
        return found

    shutil.copytree(path, out)
    settings = {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if len({g["format"] for g in groups}) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
    rewrite(out, change, settings)
    return out
