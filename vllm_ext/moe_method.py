"""Routed experts of vLLM computed from their packed tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from bitsmoe_plugin import kernels
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.packed_files import PackedFiles
from bitsmoe_plugin.packing import PackedExperts
from bitsmoe_plugin.serving import gating
from bitsmoe_plugin.sharding import Shard, local_experts, split_blocks
from vllm_ext import ops
from vllm_ext.weight_loading import load_shard


class BitsMoEMethod(FusedMoEMethodBase):
    """One MoE layer.

    Args:
        moe: vLLM's sizes and parallel degrees of the layer.
        name: of the layer in the manifest.
        files: the packed checkpoint.
    """

    def __init__(self, moe: FusedMoEConfig, name: str, files: PackedFiles) -> None:
        super().__init__(moe)
        self.name = name
        self.files = files
        self.layer: kernels.Runtime | None = None

    def create_weights(self, layer: Any, *args: Any, **extra: Any) -> None:
        """Only checks: ragged tensors have no size before the row codes are read, see below."""
        shape = self.files.specs[self.name].shape
        wanted = (self.moe.num_logical_experts, self.moe.hidden_dim, self.moe.intermediate_size)
        found = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
        if wanted != found:
            raise CheckpointError(
                f"{self.name}: the model has (experts, hidden_size, intermediate_size) = {wanted}, the "
                f"quantization_config {found}; config.json was altered"
            )
        self._refuse_variants(layer)
        self._refuse_graphs()
        gating(layer.activation.value)

    def _refuse_variants(self, layer: Any) -> None:
        """Experts that compute something else than down(act(gate) * up), weighted on the way out."""
        variants = {
            "expert biases": self.moe.has_bias,
            "router weights applied to the input": layer.apply_router_weight_on_input,
            "clamped gating": any(
                getattr(layer, option, None) is not None
                for option in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
            ),
            "shared experts fused into the routed ones": self.moe.num_experts != self.moe.num_logical_experts,
        }
        found = [text for text, present in variants.items() if present]
        if found:
            raise ConfigError(f"{self.name}: bitsmoe cannot serve experts with {', '.join(found)}")

    def _refuse_graphs(self) -> None:
        """Rows that have no kernel are computed in plain torch, which waits for the device."""
        captured = torch.device(self.moe.device).type != "cpu" and not (
            get_current_vllm_config().model_config.enforce_eager
        )
        if self.files.specs[self.name].is_tiled and captured:
            raise ConfigError(
                f"{self.name}: experts of a checkpoint converted by import-upstream are computed in plain "
                "torch, which cannot be captured in CUDA graphs; start vLLM with --enforce-eager"
            )

    def shard(self, layer: Any) -> Shard:
        """The part of the layer that this process holds."""
        parallel = self.moe.moe_parallel_config
        spec = self.files.specs[self.name]
        return Shard(
            local_experts(layer.expert_map, spec.shape.num_experts),
            split_blocks(self.name, spec.shape, parallel.tp_size, parallel.tp_rank, spec.split_unit),
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Load this process's shard; vLLM calls this for one layer after the other."""
        spec, tensors = load_shard(self.files, self.name, self.shard(layer), torch.device(self.moe.device))
        for buffer, tensor in tensors.items():
            layer.register_parameter(buffer, nn.Parameter(tensor, requires_grad=False))
        packed = PackedExperts(**{b.removeprefix("bitsmoe_"): getattr(layer, b).data for b in tensors})
        self.layer = kernels.prepare(spec, packed, gating(layer.activation.value))

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """``[T, H]`` from ``[T, H]``, ``[T, k]`` float32 and ``[T, k]`` int32: the sum over held experts.

        vLLM's runner computes the shared experts and adds up the parts of several processes.
        """
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        return ops.routed_experts(x, topk_weights, topk_ids, layer.layer_name)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """What the custom operator runs; ``topk_ids`` are local, -1 for experts held elsewhere."""
        assert self.layer is not None, "vLLM runs the model only after process_weights_after_loading"
        return self.layer.forward(x, topk_ids, topk_weights)
