"""vLLM's experts without an engine: what its model, loaders and reload see of a packed layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.model_executor.models.utils import AutoWeightsLoader

from bitsmoe_plugin.models.json_objects import read_object
from vllm_ext.config import BitsMoEServingConfig
from vllm_ext.moe_method import BitsMoEMethod

ONE = SimpleNamespace(tp_size=1, tp_rank=0)


class Experts(nn.Module):
    """What a method asks of vLLM's ``RoutedExperts``."""

    def __init__(self, shape: Any, expert_map: Tensor | None, fused: int = 0, **moe: Any) -> None:
        super().__init__()
        self.expert_map = expert_map
        self.activation = SimpleNamespace(value="silu", is_gated=True)
        self.apply_router_weight_on_input = False
        self.expert_map_manager = SimpleNamespace(num_fused_shared_experts=fused)
        sizes = {"num_logical_experts": shape.num_experts, "num_experts": shape.num_experts}
        sizes |= {"hidden_dim": shape.hidden_size, "intermediate_size": shape.intermediate_size}
        options = {"has_bias": False, "device": "cpu", "moe_parallel_config": ONE}
        self.moe_config = SimpleNamespace(**{**sizes, **options, **moe})


class Runner(nn.Module):
    """vLLM's module above it, which the model calls experts."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.routed_experts = experts

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        yield from (f"routed_experts.{n}" for n in self.routed_experts.load_weights(weights))


class Model(nn.Module):
    """The experts of a packed checkpoint, with the names of ``middle`` between decoder layer and experts."""

    def __init__(
        self, directory: Path, middle: str = "mlp", expert_map: Tensor | None = None, **moe: Any
    ) -> None:
        super().__init__()
        entries = read_object(directory / "config.json")["quantization_config"]
        self.quant_config = BitsMoEServingConfig.from_config(entries)
        self.quant_config.maybe_update_config(str(directory), AutoConfig.from_pretrained(directory))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for number, spec in enumerate(self.quant_config.files.specs.values()):
            experts = Experts(spec.shape, expert_map, **moe)
            name = self.quant_config.names.find(f"model.layers.{number}.{middle}.experts")
            self.quant_config._stream.add(f"model.layers.{number}.{middle}.experts")
            experts.quant_method = BitsMoEMethod(experts.moe_config, name, self.quant_config)
            experts.quant_method.create_weights(experts)
            block, layer = nn.Module(), nn.Module()
            block.experts = Runner(experts)
            setattr(layer, middle, block)
            self.model.layers.append(layer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's models do."""
        return AutoWeightsLoader(self).load_weights(weights)

    @property
    def experts(self) -> list[Experts]:
        return [module for module in self.modules() if isinstance(module, Experts)]

    def process(self) -> None:
        """The end of vLLM's first load."""
        for layer in self.experts:
            layer.quant_method.process_weights_after_loading(layer)


def computed(layer: Experts) -> Tensor:
    """Output of a layer for some tokens of the first two of its experts, as vLLM would have it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, layer.moe_config.hidden_dim, generator=generator)
    return layer.quant_method.forward(x, torch.full((5, 2), 0.5), torch.tensor([[0, 1]] * 5))
