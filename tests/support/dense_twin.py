"""Packed experts with random content, and the unquantized modules that compute the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeForCausalLM

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.families import read_biases, read_experts
from bitsmoe_plugin.runtime.experts import BitsMoEExperts
from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

E, H, SIZE = 5, 64, 48


def originals() -> dict[str, Any]:
    """Experts modules of transformers, by family."""
    sizes = {"hidden_size": H, "num_experts": E, "num_local_experts": E}
    return {
        "qwen3_moe": Qwen3MoeExperts(Qwen3MoeConfig(**sizes, moe_intermediate_size=SIZE)),
        "gpt_oss": GptOssExperts(GptOssConfig(**sizes, intermediate_size=SIZE)),
        "llama4_text": Llama4TextExperts(Llama4TextConfig(**sizes, intermediate_size=SIZE)),
    }


def random_packed(spec: PackedSpec, seed: int = 0) -> tuple[PackedSpec, PackedExperts]:
    """Any content is that of some layer: row codes, payload and bases are random, experts in ``spec.kept``
    have no rows. Returns the spec with the lengths that follow."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    shape, zero = spec.shape, spec.widths.index(0)
    width = torch.randint(len(spec.widths), (3, shape.num_experts, shape.rank), generator=generator)
    width[:, list(spec.kept)] = zero
    scale = torch.randint(SCALE_LEVELS, width.shape, generator=generator) * (not spec.is_tiled)
    codes = (width * SCALE_LEVELS + scale).to(torch.uint8)
    words = shape.blocks * int(torch.tensor(spec.widths)[width].sum())
    stored = int((width != zero).sum()) if spec.is_tiled else 0
    spec = replace(spec, payload_words=words, stored_rows=stored)
    tensors = {"bitsmoe_row_codes": codes}
    for name, (dtype, size) in spec.tensors().items():
        if name.endswith(("scales", "gains")):
            tensors[name] = (normal(size, 0.01).abs() + 0.01).half().view(torch.int16)
        elif name.endswith("scale_grid"):
            low, step = torch.full((3, 1, H), -3.0), torch.full((3, 1, H), 0.05)
            tensors[name] = torch.cat([low, step], 1).half().view(torch.int16)[: size[0]].view(size)
        elif name.endswith("basis") and spec.basis_bits == 16:
            tensors[name] = normal(size, H**-0.5).half().view(torch.int16)
        elif name.endswith(("basis", "payload")):
            tensors[name] = torch.randint(-(2**31), 2**31, size, generator=generator).to(torch.int32)
        elif name != "bitsmoe_row_codes":  # stored as they were
            tensors[name] = normal(size, 0.1).to(layout.ORIGINAL_DTYPES[spec.original_dtype]).view(dtype)
    return spec, PackedExperts(**{name.removeprefix("bitsmoe_"): t for name, t in tensors.items()})


def packed_and_twin(family: str, seed: int = 0, **options: Any) -> tuple[BitsMoEExperts, nn.Module]:
    """Packed experts of a family with random content, and the family's own module of the same weights."""
    original = originals()[family]
    settings = {"widths": (0, 1, 2, 3, 4, 6, 8), "basis_bits": 4, "basis_group_size": 32, "input_bases": 1}
    spec = PackedSpec(
        LayerShape(E, H, SIZE),
        **{**settings, "payload_words": 0, "grid": "trellis", "has_bias": family == "gpt_oss", **options},
    )
    spec, packed = random_packed(spec, seed)
    module = BitsMoEExperts(original, spec)
    module.load_packed(packed)
    module.verify("layer")
    twin = copy.deepcopy(original)
    decode_into(module, twin)
    return module, twin


def small_model() -> Any:
    """A causal language model of one layer, its experts packed with random content."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=H, num_hidden_layers=1, num_experts=E, num_experts_per_tok=2,
        moe_intermediate_size=SIZE, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    model.model.layers[0].mlp.experts = packed_and_twin("qwen3_moe")[0]
    return model


@torch.no_grad()
def decode_into(module: BitsMoEExperts, twin: nn.Module) -> None:
    """Give an unquantized experts module the weights that a packed one stands for."""
    spec, packed, weights = module.spec, module.packed(), read_experts(twin)
    layer = ReferenceLayer.prepare(spec, packed, module.gating)
    read, write = layer.bases()
    rank, rows_of = spec.shape.rank, layer.rows_of(list(range(spec.shape.num_experts)))
    for expert in range(spec.shape.num_experts):
        (gate, at_gate), (up, at_up), (down, at_down) = (rows_of(factor, expert) for factor in range(3))
        weights.gate[expert] = gate.T @ read[:rank][at_gate]
        weights.up[expert] = up.T @ read[-rank:][at_up]
        weights.down[expert] = write[:, at_down] @ down
    for position, expert in enumerate(spec.kept):
        weights.gate[expert], weights.up[expert] = spec.original(packed.kept_input[position]).float()
        weights.down[expert] = spec.original(packed.kept_output[position]).float()
    biases = read_biases(twin)
    if biases is not None:
        biases.gate[:], biases.up[:] = spec.original(packed.input_bias).float().unbind(1)
        biases.down[:] = spec.original(packed.output_bias).float()


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what is wanted."""
    return float((found.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())
