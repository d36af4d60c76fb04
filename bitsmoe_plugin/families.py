"""Where a model keeps its routed experts, and what they compute.

transformers 5 stores routed experts fused: a module with ``gate_up_proj [E, 2I, H]`` and
``down_proj [E, H, I]`` that is called ``experts(hidden [T, H], top_k_index [T, k],
top_k_weights [T, k])``. Every model that follows this convention is supported without an entry
here; what deviates is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.spectral import ExpertWeights


@dataclass(frozen=True)
class MoELayer:
    """Attributes:
    name: path of the experts module, for example ``model.layers.3.mlp.experts``.
    layer_name: path of the decoder layer that holds it.
    module: the experts module.
    """

    name: str
    layer_name: str
    module: Any


def looks_like_experts(module: nn.Module) -> bool:
    """True for a module that holds fused expert parameters, of the convention or not."""
    parameters = dict(module.named_parameters(recurse=False))
    return "down_proj" in parameters and parameters["down_proj"].dim() == 3


def check_convention(name: str, module: nn.Module, model_type: str) -> None:
    """Refuse experts that compute something else than the fused convention.

    Raises:
        QuantizationError: naming the family and what deviates.
    """
    kind = type(module).__name__
    problems = []
    if "gate_up_proj" not in dict(module.named_parameters(recurse=False)):
        problems.append("no fused gate_up_proj")
    for flag, wanted, text in (
        ("is_transposed", False, "transposed weights"),
        ("has_bias", False, "expert biases"),
        ("has_gate", True, "experts without a gate"),
        ("is_concatenated", True, "interleaved gate and up rows"),
    ):
        if getattr(module, flag, None) is not wanted:
            problems.append(text if hasattr(module, flag) else f"unknown convention ({flag} is not declared)")
    if problems:
        raise QuantizationError(
            f"{name} ({kind}, model type {model_type!r}) cannot be quantized: {'; '.join(problems)}. "
            "Supported are experts that follow the fused convention of transformers "
            "(gate_up_proj [E, 2I, H], down_proj [E, H, I], as in Qwen3-MoE or Mixtral)."
        )


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model in forward order.

    Raises:
        QuantizationError: there are none, or one deviates from the convention.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    layers = []
    for name, module in model.named_modules():
        if looks_like_experts(module):
            check_convention(name, module, model_type)
            layers.append(MoELayer(name, decoder_layer_name(model, name), module))
    if not layers:
        raise QuantizationError(
            f"model type {model_type!r} has no MoE layers that BitsMoE knows: no module holds fused "
            "routed experts (gate_up_proj [E, 2I, H] and down_proj [E, H, I]). "
            "BitsMoE quantizes routed experts only; use another method for a dense model."
        )
    return layers


def decoder_layer_name(model: nn.Module, experts_name: str) -> str:
    """Path of the decoder layer (member of the outermost ModuleList) around an experts module."""
    parts = experts_name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    raise QuantizationError(
        f"{experts_name} is not inside a list of decoder layers; this architecture is not supported."
    )


def read_experts(module: Any) -> ExpertWeights:
    """The module's fused parameters, on the CPU (views, if they are there)."""
    gate, up = module.gate_up_proj.detach().cpu().chunk(2, dim=1)
    return ExpertWeights(gate, up, module.down_proj.detach().cpu())


def apply_gating(module: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The module's own gating, ``[n, I]`` and ``[n, I]`` -> ``[n, I]``."""
    return module._apply_gate(torch.cat([gate, up], dim=-1))
