"""Where a model keeps its routed experts, and what they compute.

transformers 5 stores routed experts fused: a module with ``gate_up_proj`` and ``down_proj`` that is called
``experts(hidden [T, H], top_k_index [T, k], top_k_weights [T, k])`` and declares how it deviates from
``gate_up_proj [E, 2I, H]``, ``down_proj [E, H, I]``: transposed weights, interleaved gate and up, biases.
Every model that does so is supported without an entry here; other modules need one in ``UNDECLARED``, or
are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights


@dataclass(frozen=True)
class Layout:
    """How an experts module stores its weights and is called; the first three as transformers names them.

    Attributes:
        is_transposed: ``[E, H, 2I]`` and ``[E, I, H]`` instead of ``[E, 2I, H]`` and ``[E, H, I]``.
        is_concatenated: gate above up, not row by row in turn.
        has_bias: ``gate_up_proj_bias [E, 2I]`` and ``down_proj_bias [E, H]``.
        takes_copies: called with one copy of the hidden states per expert, ``[E * T, H]``, multiplied
            by the router's weights already and zero where a token is not routed.
    """

    is_transposed: bool = False
    is_concatenated: bool = True
    has_bias: bool = False
    takes_copies: bool = False


UNDECLARED = {"Llama4TextExperts": Layout(is_transposed=True, takes_copies=True)}
"""Class name -> layout of experts that do not declare it."""

_AGREEMENT = 0.05
"""Relative difference at which a module computes something else than it declares; bfloat16 gives 0.01."""


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


def layout_of(module: nn.Module) -> Layout:
    """Of a module that ``check_convention`` accepts."""
    flags = ("is_transposed", "is_concatenated", "has_bias")
    declared = {flag: getattr(module, flag) for flag in flags if hasattr(module, flag)}
    return UNDECLARED.get(type(module).__name__) or Layout(**declared)


def check_convention(name: str, module: nn.Module, model_type: str) -> None:
    """Refuse experts that compute something else than the fused convention and its declared variants.

    Raises:
        QuantizationError: naming the family and what deviates.
    """
    kind = type(module).__name__
    problems = []
    if "gate_up_proj" not in dict(module.named_parameters(recurse=False)):
        problems.append("no fused gate_up_proj")
    if kind not in UNDECLARED:
        flags = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
        problems += [
            f"unknown convention ({flag} is not declared)" for flag in flags if not hasattr(module, flag)
        ]
    if not getattr(module, "has_gate", True):
        problems.append("experts without a gate")
    if any("." in parameter for parameter, _ in module.named_parameters()):
        problems.append("an activation with parameters of its own")
    if getattr(module, "has_post_expert_norm", False):
        problems.append("a norm after each expert")
    if problems:
        raise QuantizationError(
            f"{name} ({kind}, model type {model_type!r}) cannot be quantized: {'; '.join(problems)}. "
            "Supported are experts that follow the fused convention of transformers "
            "(gate_up_proj [E, 2I, H], down_proj [E, H, I], as in Qwen3-MoE or Mixtral), and its transposed, "
            "interleaved and biased variants."
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


def layer_shape(module: Any) -> LayerShape:
    """Sizes of an unquantized experts module."""
    experts, hidden, intermediate = module.down_proj.shape
    if layout_of(module).is_transposed:
        hidden, intermediate = intermediate, hidden
    return LayerShape(experts, hidden, intermediate)


def split_gate_up(module: Any, gate_up: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Gate and up of what the module keeps along ``dim`` of one tensor."""
    if layout_of(module).is_concatenated:
        gate, up = gate_up.chunk(2, dim=dim)
        return gate, up
    gate, up = gate_up.unflatten(dim, (-1, 2)).unbind(dim % gate_up.dim() + 1)
    return gate, up


def read_experts(module: Any) -> ExpertWeights:
    """The module's fused parameters, as views where they are."""
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if layout_of(module).is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate, up = split_gate_up(module, gate_up, 1)
    return ExpertWeights(gate, up, down)


def read_biases(module: Any) -> ExpertBiases | None:
    """The biases of the module's experts, None if they have none."""
    if not layout_of(module).has_bias:
        return None
    gate, up = split_gate_up(module, module.gate_up_proj_bias.detach(), 1)
    return ExpertBiases(gate, up, module.down_proj_bias.detach())


def fused_parameters(module: Any, weights: ExpertWeights, biases: ExpertBiases | None) -> dict[str, Tensor]:
    """The other way round: name -> tensor of the module's parameters, in its own layout, contiguous."""
    layout = layout_of(module)

    def join(gate: Tensor, up: Tensor) -> Tensor:
        if layout.is_concatenated:
            return torch.cat([gate, up], 1)
        return torch.stack([gate, up], 2).flatten(1, 2)

    found = {"gate_up_proj": join(weights.gate, weights.up), "down_proj": weights.down}
    if layout.is_transposed:
        found = {name: tensor.transpose(1, 2).contiguous() for name, tensor in found.items()}
    if biases is not None:
        found |= {"gate_up_proj_bias": join(biases.gate, biases.up), "down_proj_bias": biases.down}
    return found


def apply_gating(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    """The module's own gating, ``[n, I]`` and ``[n, I]`` -> ``[n, I]``."""
    if not hasattr(module, "_apply_gate"):
        return module.act_fn(gate) * up
    if layout_of(module).is_concatenated:
        return module._apply_gate(torch.cat([gate, up], dim=-1))
    return module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


def routed_inputs(module: nn.Module, arguments: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[T, H]``, experts ``[T, k]`` and their weights ``[T, k]`` of a call of the module.

    Raises:
        QuantizationError: a token's copies differ between experts, so there is no one input to calibrate on.
    """
    if not layout_of(module).takes_copies:
        hidden, top_k_index, top_k_weights = arguments[:3]
        return hidden, top_k_index, top_k_weights
    copies = arguments[0].unflatten(0, (layer_shape(module).num_experts, -1))
    routed = copies.ne(0).any(-1)
    if int(routed.sum(0).max()) > 1:
        raise QuantizationError(
            f"{type(module).__name__} with several experts per token cannot be quantized: each expert gets "
            "an input of its own. Supported is num_experts_per_tok=1."
        )
    expert = routed.int().argmax(0)[:, None]
    return copies.sum(0), expert, torch.ones(expert.shape, device=expert.device)


def check_computation(
    name: str, module: Any, weights: ExpertWeights, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Compare what a module computes with what its layout says, on a few tokens.

    A class can follow the convention by its declaration and still compute something else.

    Args:
        inputs: from ``routed_inputs``, on any device.

    Raises:
        QuantizationError: naming the module.
    """
    if layout_of(module).takes_copies:  # an entry of ours, tested
        return
    hidden, index, share = (tensor[:4].to(module.down_proj.device) for tensor in inputs)
    found = module(hidden, index, share.to(hidden.dtype)).float()
    biases, wanted = read_biases(module), torch.zeros_like(found)
    for token, slot in torch.nonzero(index < weights.num_experts).tolist():
        expert, x = int(index[token, slot]), hidden[token].float()
        gate, up = weights.gate[expert].float() @ x, weights.up[expert].float() @ x
        if biases is not None:
            gate, up = biases.add(gate, up, expert)
        out = weights.down[expert].float() @ apply_gating(module, gate, up)
        wanted[token] += float(share[token, slot]) * (
            out if biases is None else out + biases.down[expert].float()
        )
    difference = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if difference > _AGREEMENT:
        raise QuantizationError(
            f"{name} ({type(module).__name__}) cannot be quantized: it declares the fused convention, but "
            f"computes something else (outputs differ by {100 * difference:.0f} %)"
        )
