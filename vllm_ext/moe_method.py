"""Routed experts of vLLM computed from their packed tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.sharding import Shard, local_experts, split_blocks
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from vllm_ext import ops
from vllm_ext.expert_gating import gating_of
from vllm_ext.expert_parameters import layer_loader, placeholder
from vllm_ext.layer_checks import check_experts, most_tokens
from vllm_ext.loaded_experts import LoadedExperts
from vllm_ext.reload import verify_streamed
from vllm_ext.served_checkpoint import Checkpoint
from vllm_ext.weight_loading import cut, load_shard

logger = init_logger("vllm.bitsmoe_plugin")


class BitsMoEMethod(FusedMoEMethodBase):
    """One MoE layer.

    Args:
        moe: vLLM's sizes and parallel degrees of the layer.
        name: of the layer in the manifest.
        checkpoint: that the engine names.
    """

    def __init__(self, moe: FusedMoEConfig, name: str, checkpoint: Checkpoint) -> None:
        super().__init__(moe)
        self.name = name
        self.files = checkpoint.files
        self._checkpoint = checkpoint
        self._reloaded: dict[str, Tensor] = {}
        self._sent: dict[str, Tensor] = {}
        self._has_failed = False

    def create_weights(self, layer: Any, *args: Any, **extra: Any) -> None:
        """Checks, and places for the tensors, whose sizes are known once the row codes are read."""
        check_experts(self.name, self.files.specs[self.name], self.moe, layer)
        self.experts = LoadedExperts(
            self,
            gating_of(self.name, layer, self._checkpoint.gating(self.name)),
            in_place=self._is_on_gpu(),
            captured=self._is_captured(),
        )
        self._most_tokens = most_tokens() if self._is_on_gpu() else 0
        self._layer = weakref.ref(layer)  # vLLM keeps loaders, and by them this object, longer than layers
        for buffer in self.files.specs[self.name].tensors():
            layer.register_parameter(buffer, placeholder(self, buffer))
        layer.load_weights = layer_loader(layer, self)

    def _is_on_gpu(self) -> bool:
        return torch.device(self.moe.device).type != "cpu"

    def _is_captured(self) -> bool:
        return self._is_on_gpu() and not get_current_vllm_config().model_config.enforce_eager

    def shard(self, layer: Any) -> Shard:
        """The part of the layer that this process holds."""
        parallel = self.moe.moe_parallel_config
        spec = self.files.specs[self.name]
        return Shard(
            local_experts(layer.expert_map, spec.shape.num_experts),
            split_blocks(self.name, spec.shape, parallel.tp_size, parallel.tp_rank, spec.split_unit),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Load or reload this process's shard; vLLM calls this for one layer after the other.

        Raises:
            CheckpointError: what arrived is damaged, incomplete or of other experts.
            ConfigError: CUDA graphs were made for other sizes.
        """
        if self._has_failed:
            raise CheckpointError(
                f"{self.name}: an earlier reload failed, whose tensors vLLM may mix with those of this one; "
                "restart vLLM"
            )
        self._has_failed = True
        if self.experts.spec is None:
            self._load_files(layer)
        else:
            self._update(layer, self._reloaded)
        self._register(layer)
        self._has_failed = False

    def _register(self, layer: Any) -> None:
        for buffer, parameter in self.experts.parameters.items():
            layer.register_parameter(buffer, parameter)
        if self._is_on_gpu():  # sleep of level 2 brings back buffers
            for key, tensor in self.experts.derived().items():
                layer.register_buffer(f"derived_{key}", tensor, persistent=False)

    def _load_files(self, layer: Any) -> None:
        device = torch.device(self.moe.device)
        self._checkpoint.note_loaded()
        self.experts.replace(*load_shard(self.files, self.name, self.shard(layer), device))
        if self._most_tokens:
            self.experts.warm_up(self.moe.experts_per_token, self.moe.in_dtype, self._most_tokens)

    def _update(self, layer: Any, arrived: dict[str, Tensor]) -> None:
        """Take what vLLM handed over, by buffer name."""
        self.experts.withdraw()
        self._reloaded, self._sent = {}, {}
        newest = self._checkpoint.files
        if newest is not self.files:  # the engine names another checkpoint, these tensors are from it
            self._check_shape(newest)
            self.files = newest
            self._load_files(layer)
        elif arrived:
            self.experts.replace(*self._streamed(arrived, self.shard(layer)))
        else:
            self.experts.derive()

    def _streamed(self, arrived: dict[str, Tensor], shard: Shard) -> tuple[Any, dict[str, Tensor]]:
        missing = self._buffers() - arrived.keys()
        if missing:
            raise CheckpointError(
                f"{self.name}: a reload brought {', '.join(sorted(arrived))} without "
                f"{', '.join(sorted(missing))}; packed tensors of a layer are replaced together"
            )
        packed = PackedExperts(**{b.removeprefix("bitsmoe_"): tensor for b, tensor in arrived.items()})
        spec = verify_streamed(self.name, self.files, packed)
        return cut(spec, packed, shard, torch.device(self.moe.device))

    def _check_shape(self, files: PackedFiles) -> None:
        spec = files.specs.get(self.name)
        shape = self.files.specs[self.name].shape
        if spec is None or spec.shape != shape:
            raise CheckpointError(
                f"{self.name}: the checkpoint to reload has {spec and spec.shape}, the model {shape}; "
                "it is of another model"
            )

    def _buffers(self) -> set[str]:
        return set(self.files.specs[self.name].tensors())

    @torch.inference_mode(False)
    @torch.no_grad()
    def receive(self, buffer: str, tensor: Tensor, *, reloading: bool) -> None:
        """See ``expert_parameters.Receiver``."""
        if self.experts.spec is None:
            return  # at start the tensors are read from the files, verified and cut as they are read
        if reloading:
            self._reloaded[buffer] = tensor
            return
        if buffer in self._sent:  # another update began; the one before did not end
            self._sent = {}
        self._sent[buffer] = tensor.clone()  # the sender may use its memory again
        layer = self._layer()
        if layer is not None and self._sent.keys() >= self._buffers():
            self._update(layer, self._sent)
            self._register(layer)

    def refuse(self, tensor_name: str) -> None:
        """See ``expert_parameters.Receiver``."""
        if "bitsmoe_" in tensor_name and self._checkpoint.files is not self.files:
            return  # of a checkpoint with a manifest, from which all of its tensors are read
        self.experts.withdraw()
        if "bitsmoe_" not in tensor_name:
            raise ConfigError(
                f"{self.name}: {tensor_name} is of unquantized experts, and packed ones are served; quantize "
                "the new weights (bitsmoe quantize) and hand over their packed tensors"
            )
        raise CheckpointError(
            f"{self.name}: {tensor_name} is none of the packed tensors that are served; reload from a "
            "checkpoint's path, whose manifest describes it"
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def written(self, buffer: str) -> None:
        """See ``expert_parameters.Receiver``."""
        self.experts.written(buffer)

    def exposed(self) -> None:
        """See ``expert_parameters.Receiver``."""
        self.experts.exposed()

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
        if layer.apply_router_weight_on_input:  # of one expert per token, see ``layer_checks``
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        return ops.routed_experts(x, topk_weights, topk_ids, layer.layer_name)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """What the custom operator runs; ``topk_ids`` are local, -1 for experts held elsewhere."""
        self._check_places()
        if self._sent:
            logger.warning_once(
                "%s: a part of its packed tensors was sent; its experts change when all are there", self.name
            )
        return self.experts.forward(x, topk_ids, topk_weights)

    def _check_places(self) -> None:
        """While vLLM reloads, placeholders stand in the layer; a reload that failed leaves them there."""
        layer, buffer = self._layer(), "bitsmoe_payload"
        if layer is not None and getattr(layer, buffer) is not self.experts.parameters.get(buffer):
            raise CheckpointError(
                f"{self.name}: a reload of weights began and did not end; reload from a sound checkpoint, or "
                "restart vLLM"
            )
