"""Where a model keeps its routed experts, and what they compute.

transformers 5 stores routed experts fused: a module with ``gate_up_proj`` and ``down_proj`` that is called
``experts(hidden [T, H], top_k_index [T, k], top_k_weights [T, k])`` and declares how it deviates from
``gate_up_proj [E, 2I, H]``, ``down_proj [E, H, I]``: transposed weights, interleaved gate and up, biases, no
gate (``up_proj [E, I, H]``), a norm of what each expert puts out. Every model that does so is supported
without an entry here; other modules need one in ``UNDECLARED``, or are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_weights import ExpertBiases, ExpertWeights
from bitsmoe_plugin.models.towers import tower_modules
from bitsmoe_plugin.models.unsupported_experts import check_one_list, refuse_unfused


@dataclass(frozen=True)
class Layout:
    """How an experts module stores its weights and is called; the first five as transformers names them.

    Attributes:
        is_transposed: ``[E, H, 2I]`` and ``[E, I, H]`` instead of ``[E, 2I, H]`` and ``[E, H, I]``.
        is_concatenated: gate above up, not row by row in turn.
        has_bias: ``gate_up_proj_bias [E, 2I]`` and ``down_proj_bias [E, H]``.
        has_gate: otherwise there is ``up_proj [E, I, H]`` (and its bias) instead, an expert is down(act(up)).
        has_post_expert_norm: ``post_expert_norm`` is applied to what each expert puts out.
        takes_copies: called with one copy of the hidden states per expert, ``[E * T, H]``, multiplied
            by the router's weights already and zero where a token is not routed.
        has_identity_experts: an id from the number of experts on puts out the token itself.
    """

    is_transposed: bool = False
    is_concatenated: bool = True
    has_bias: bool = False
    has_gate: bool = True
    has_post_expert_norm: bool = False
    takes_copies: bool = False
    has_identity_experts: bool = False

    @property
    def input_name(self) -> str:
        """Parameter that reads the hidden states."""
        return "gate_up_proj" if self.has_gate else "up_proj"


UNDECLARED = {
    "Llama4TextExperts": Layout(is_transposed=True, takes_copies=True),
    "LongcatFlashExperts": Layout(has_identity_experts=True),
    "Step3p7Experts": Layout(),
}
"""Class name -> layout of experts that do not declare it."""

_DECLARED = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
_NORM = "post_expert_norm"


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
    """True for a module that holds fused parameters of routed experts, of the convention or not.

    Shared experts may be fused as well (Inkling); they declare nothing, and no router gives them ids.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if "down_proj" not in parameters or parameters["down_proj"].dim() != 3:
        return False
    if type(module).__name__ in UNDECLARED or any(hasattr(module, flag) for flag in _DECLARED):
        return True
    return "shared" not in type(module).__name__.lower()


def layout_of(module: nn.Module) -> Layout:
    """Of a module that ``check_convention`` accepts."""
    flags = (*_DECLARED, "has_post_expert_norm")
    declared = {flag: getattr(module, flag) for flag in flags if hasattr(module, flag)}
    return UNDECLARED.get(type(module).__name__) or Layout(**declared)


def check_convention(name: str, module: nn.Module, model_type: str) -> None:
    """Refuse experts that compute something else than the fused convention and its declared variants.

    Raises:
        QuantizationError: naming the family and what deviates.
    """
    kind = type(module).__name__
    problems, layout = [], layout_of(module)
    if layout.input_name not in dict(module.named_parameters(recurse=False)):
        problems.append(f"no fused {layout.input_name}")
    if kind not in UNDECLARED:
        problems += [
            f"unknown convention ({flag} is not declared)" for flag in _DECLARED if not hasattr(module, flag)
        ]
    if layout.has_post_expert_norm and not isinstance(getattr(module, _NORM, None), nn.Module):
        problems.append(f"no {_NORM}")
    others = {parameter.partition(".")[0] for parameter, _ in module.named_parameters() if "." in parameter}
    if others - ({_NORM} if layout.has_post_expert_norm else set()):
        problems.append("an activation with parameters of its own")
    if problems:
        raise QuantizationError(
            f"{name} ({kind}, model type {model_type!r}) cannot be quantized: {'; '.join(problems)}. "
            "Supported are experts that follow the fused convention of transformers "
            "(gate_up_proj [E, 2I, H], down_proj [E, H, I], as in Qwen3-MoE or Mixtral), and its transposed, "
            "interleaved, biased and ungated variants."
        )


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model in forward order, without those of encoders for images and sounds.

    Raises:
        QuantizationError: there are none, one deviates from the convention, or they are in several lists of
            decoder layers, or several in one layer.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    layers, towers = [], tower_modules(model)
    for name, module in model.named_modules():
        if looks_like_experts(module) and module not in towers:
            check_convention(name, module, model_type)
            layers.append(MoELayer(name, decoder_layer_name(model, name), module))
    if not layers:
        refuse_unfused(model, model_type)
        raise QuantizationError(
            f"model type {model_type!r} has no MoE layers that BitsMoE knows: no module holds fused "
            "routed experts (gate_up_proj [E, 2I, H] and down_proj [E, H, I]). "
            "BitsMoE quantizes routed experts only; use another method for a dense model."
        )
    check_one_list([(layer.name, layer.layer_name) for layer in layers], model_type)
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
    return LayerShape(experts, hidden, intermediate, layout_of(module).has_gate)


def split_inputs(module: Any, fused: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Gate and up, or up alone, of what the module keeps along ``dim`` of one tensor."""
    return split_gate_up(module, fused, dim) if layout_of(module).has_gate else (fused,)


def split_gate_up(module: Any, gate_up: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Gate and up of what the module keeps along ``dim`` of one tensor."""
    if layout_of(module).is_concatenated:
        gate, up = gate_up.chunk(2, dim=dim)
        return gate, up
    gate, up = gate_up.unflatten(dim, (-1, 2)).unbind(dim % gate_up.dim() + 1)
    return gate, up


def read_experts(module: Any) -> ExpertWeights:
    """The module's fused parameters, as views where they are."""
    layout = layout_of(module)
    fused, down = getattr(module, layout.input_name).detach(), module.down_proj.detach()
    if layout.is_transposed:
        fused, down = fused.transpose(1, 2), down.transpose(1, 2)
    return ExpertWeights.of(split_inputs(module, fused[: len(down)], 1), down)


def read_biases(module: Any) -> ExpertBiases | None:
    """The biases of the module's experts, None if they have none."""
    layout = layout_of(module)
    if not layout.has_bias:
        return None
    fused = getattr(module, f"{layout.input_name}_bias").detach()
    return ExpertBiases.of(split_inputs(module, fused, 1), module.down_proj_bias.detach())


def fused_parameters(module: Any, weights: ExpertWeights, biases: ExpertBiases | None) -> dict[str, Tensor]:
    """The other way round: name -> tensor of the module's parameters, in its own layout, contiguous."""
    layout = layout_of(module)

    def join(inputs: tuple[Tensor, ...]) -> Tensor:
        if layout.has_identity_experts:  # they have rows, of no effect
            inputs = tuple(nn.functional.pad(x, (0, 0, 0, 0, 0, module.zero_expert_num)) for x in inputs)
        if layout.is_concatenated or len(inputs) == 1:
            return torch.cat(inputs, 1)
        return torch.stack(inputs, 2).flatten(1, 2)

    found = {layout.input_name: join(weights.inputs), "down_proj": weights.down}
    if layout.is_transposed:
        found = {name: tensor.transpose(1, 2).contiguous() for name, tensor in found.items()}
    if biases is not None:
        found |= {f"{layout.input_name}_bias": join(biases.inputs), "down_proj_bias": biases.down}
    return found


def apply_gating(module: Any, *products: Tensor) -> Tensor:
    """The module's own gating of gate and up, or its activation of up, all ``[n, I]``."""
    if not layout_of(module).has_gate:
        return module.act_fn(*products)
    gate, up = products
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
