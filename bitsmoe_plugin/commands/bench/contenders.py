"""Implementations of one MoE layer that ``bench layer`` measures side by side, on random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.bench.synthetic import random_layer, shares_at
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.runtime import dispatch

GPTQ_GROUP = 128

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """Attributes:
    name: of the implementation.
    bits: stored bits per expert weight, everything counted.
    forward: (hidden ``[T, H]``, ids ``[T, k]`` int64, weights ``[T, k]`` float32) -> ``[T, H]``.
    moved: ids ``[T, k]`` -> bytes of weights that a forward pass has to read at least.
    capturable: on a GPU, ``forward`` does not wait for the device, so a CUDA graph can be made of it.
    """

    name: str
    bits: float
    forward: Forward
    moved: Callable[[Tensor], int]
    capturable: bool = True


def bitsmoe(shape: LayerShape, bits: float, device: str) -> Contender:
    """Ours at ``bits`` counted bits per weight, default options."""
    config = BitsMoEConfig()
    options = {"basis_bits": config.basis_bits, "basis_group_size": config.basis_group_size}
    fixed = layout.fixed_bits(shape, input_bases=config.input_bases, **options)
    shares = shares_at(bits - sum(fixed.values()) / shape.weights, config.widths)
    spec, packed = random_layer(shape, widths=config.widths, shares=shares, grid=config.grid, **options)
    on_device = layout.PackedExperts(
        **{name.removeprefix("bitsmoe_"): t.to(device) for name, t in packed.tensors()}
    )
    runtime = dispatch.prepare(spec, on_device, gating("silu"))
    index = layout.index_rows(packed.row_codes, spec.widths, shape)
    starts = torch.tensor(index.starts).flatten()
    words = torch.cat([starts, torch.tensor([index.words])]).diff().view(3, -1).sum(0)
    bases = fixed["bases"] // 8

    def moved(ids: Tensor) -> int:
        used = torch.unique(ids)
        return bases + int(4 * words[used].sum()) + 3 * shape.rank * len(used)

    name = f"bitsmoe {bits:g} bits"
    return Contender(name, packed.stored_bits() / shape.weights, runtime.forward, moved)


def _dense_moved(shape: LayerShape) -> Callable[[Tensor], int]:
    return lambda ids: 6 * shape.hidden_size * shape.intermediate_size * len(torch.unique(ids))


def _random_dense(shape: LayerShape, device: str) -> tuple[Tensor, Tensor]:
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def normal(experts: int, rows: int, columns: int) -> Tensor:
        return torch.randn(experts, rows, columns, dtype=torch.bfloat16, device=device) * columns**-0.5

    return normal(e, 2 * i, h), normal(e, h, i)


def dense(shape: LayerShape, device: str) -> Contender:
    """bfloat16 experts as transformers computes them (``experts_implementation="grouped_mm"``)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    gate_up, down = _random_dense(shape, device)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)
    return Contender("bf16, transformers", 16.0, module, _dense_moved(shape))


def dense_vllm_cpu(shape: LayerShape) -> Contender:
    """bfloat16 experts as vLLM computes them on a CPU (its fused operator, weights repacked for it)."""
    import vllm._custom_ops as ops

    gate_up, down = _random_dense(shape, "cpu")
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    gate_up, down = (ops.cpu_prepack_moe_weight(weight, isa) for weight in (gate_up, down))

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        ops.cpu_fused_moe(out, hidden, gate_up, down, None, None, weights, ids.int(), "silu", isa)
        return out

    return Contender(f"bf16, vLLM ({isa})", 16.0, forward, _dense_moved(shape))


def gptq(shape: LayerShape, bits: int, device: str) -> Contender:
    """GPTQ weights as gptqmodel computes them: a linear module for each projection of each expert.

    On a GPU its Triton kernel, the only one there for 2 bits, which dequantizes before each product.
    """
    from gptqmodel.quantization import FORMAT

    if device == "cpu":
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear as Linear
    else:
        from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear as Linear

    def linear(columns: int, rows: int) -> Linear:
        module = Linear(
            bits,
            GPTQ_GROUP,
            sym=True,
            desc_act=False,
            in_features=columns,
            out_features=rows,
            format=FORMAT.GPTQ_V2,
        )
        module.qweight.random_(-(2**31), 2**31 - 1)
        module.qzeros.random_(-(2**31), 2**31 - 1)
        module.scales = torch.rand_like(module.scales, dtype=torch.float) * columns**-0.5
        module.scales = module.scales.to(torch.bfloat16)
        # Else it compiles its dequantization, and for hundreds of modules again at every call: 50 ms each.
        module.optimized = True
        module.to(device).eval().post_init()
        return module

    h, i = shape.hidden_size, shape.intermediate_size
    experts = [(linear(h, i), linear(h, i), linear(i, h)) for _ in range(shape.num_experts)]
    stored = sum(b.numel() * b.element_size() for b in experts[0][0].buffers()) * 8 / (h * i)

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in torch.unique(ids).tolist():
            token, slot = torch.where(ids == expert)
            gate, up, down = experts[expert]
            x = hidden[token]
            y = down(torch.nn.functional.silu(gate(x)) * up(x)) * weights[token, slot, None].to(x.dtype)
            out.index_add_(0, token, y)
        return out

    def moved(ids: Tensor) -> int:
        return int(3 * h * i * stored / 8) * len(torch.unique(ids))

    return Contender(f"GPTQ {bits} bits, gptqmodel", stored, forward, moved, capturable=False)


def contenders(shape: LayerShape, bits: list[float], device: str) -> Iterator[Contender]:
    """Those that can be had: packages that are not installed are left out."""
    yield dense(shape, device)
    if device == "cpu" and find_spec("vllm"):
        yield dense_vllm_cpu(shape)
    if find_spec("gptqmodel"):
        yield gptq(shape, 2, device)
    for width in bits:
        yield bitsmoe(shape, width, device)
