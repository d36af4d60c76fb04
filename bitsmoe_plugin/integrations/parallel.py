"""Packed experts where transformers spreads a model over processes (``distributed_config``, ``tp_plan``).

The plans of a model speak of the parameters of unquantized experts, and what transformers makes of the
entries for their module depends on its release. So entries for experts are taken out of the plans, and each
process reads its part of the packed tensors, computes that, and sums over the processes that share a batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.codec.sharding import Shard, split_blocks, whole
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.models.families import decoder_layer_name

_WITHOUT_EFFECT = "grouped_gemm"
"""Style of transformers that only says how parameters are split, for a module that has none of these."""

WHOLE, ROWS, EXPERTS = "whole", "rows", "experts"
_PACKED = r"\.bitsmoe_\w+$"


def distributed_config(model: Any) -> Any:
    """transformers' DistributedConfig of a model that is being loaded, None for one in a single process."""
    config = getattr(model.config, "distributed_config", None)
    sizes = [getattr(config, name, 1) for name in ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size")]
    return config if any(size > 1 for size in sizes) else None


def _replicas(config: Any) -> int:
    """Processes that see different tokens."""
    return config.fsdp_size * getattr(config, "dp_replicate_size", 1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SplitLayers:
    """The layers that each process reads from files itself, its part of them.

    Attributes:
        files: of the checkpoint.
        stored: layer name in the model -> in ``files``.
        by: what a process holds: WHOLE layers, ROWS (a range of each row), or some EXPERTS.
        shards: layer name in the model -> what this process holds of it, once it is loaded.
    """

    files: PackedFiles
    stored: dict[str, str]
    by: str
    shards: dict[str, Shard] = field(default_factory=dict)

    def load(self, model: Any) -> None:
        """Read, verify and cut the part of this process, layer by layer, and let modules sum over processes.

        Args:
            model: from ``empty_split_layers``, with all else loaded; without layers of other pipeline stages.
        """
        model._keys_to_ignore_on_load_unexpected.discard(_PACKED)
        by, part, parts, group = WHOLE, 0, 1, None
        if model._mesh_manager is not None:  # None: the config is another model's, which was spread
            mesh = model._mesh_manager.get_mesh("tp")
            by, part, parts, group = self.by, mesh.get_local_rank(), mesh.size(), mesh.get_group()
        modules = dict(model.named_modules())
        for name in filter(modules.__contains__, self.stored):
            module = modules[name]
            shard = shard_of(name, module.whole_shape, parts, part, by, module.spec.split_unit)
            self.shards[name] = shard
            device = next(modules[decoder_layer_name(model, name)].parameters()).device
            module.spec, packed = self.files.read_shard(self.stored[name], shard)
            module.load_packed(packed)
            module.to(device)
            if by != WHOLE:
                first = shard.experts[0]
                module.routed = partial(summed_forward, module.routed, group, first, len(shard.experts))

    def whole_tensors(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """Name and value of the packed tensors of all processes together, from the files.

        Raises:
            CheckpointError: the files are gone or altered, or this process holds something else by now.
        """
        for name, shard in self.shards.items():
            _, loaded = self.files.read_shard(self.stored[name], shard)
            held = dict(model.get_submodule(name).packed().tensors())
            if any(not torch.equal(held[buffer].cpu(), tensor) for buffer, tensor in loaded.tensors()):
                raise CheckpointError(
                    f"{name} has changed since it was loaded, and this process holds only a part of it; "
                    "change and save a model that one process holds whole"
                )
            for buffer, tensor in self.files.read(self.stored[name]).tensors():
                yield f"{name}.{buffer}", tensor


def empty_split_layers(
    model: Any, config: Any, files: PackedFiles, stored: dict[str, str]
) -> SplitLayers | None:
    """Prepare a model for ``SplitLayers.load``: its packed tensors are taken out, so nobody loads them whole.

    Args:
        model: on the meta device, with ``BitsMoEExperts``.
        config: from ``distributed_config``.
        files, stored: see ``SplitLayers``.

    Returns:
        None if each process holds all experts, and transformers can load them: no plan splits them, and FSDP,
        which would shard them like weights, has no part.

    Raises:
        ConfigError: a layer cannot be split, a plan of the caller's own names experts, or there are no files.
    """
    by = take_out_of_plans(model, list(stored), config)
    if by == WHOLE and _replicas(config) == 1:
        return None
    if by == EXPERTS and config.ep_size != config.tp_size:
        raise ConfigError(
            f"distributed_config: ep_size={config.ep_size} with tp_size={config.tp_size} is not supported "
            "with packed experts, whose tokens stay in their replica; give both the same value"
        )
    if not files.tensors:
        raise ConfigError(
            "distributed_config: packed experts are split while they are read from files; load the model "
            "from a directory or the hub, not from a state_dict"
        )
    for name in stored:
        module = model.get_submodule(name)
        shard_of(name, module.whole_shape, config.tp_size, 0, by, module.spec.split_unit)
        for tensor in module.spec.tensors():
            delattr(module, tensor)
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), _PACKED}
    return SplitLayers(files, stored, by)


def shard_of(name: str, shape: LayerShape, parts: int, part: int, by: str, unit: int) -> Shard:
    """What process ``part`` of ``parts`` holds of a layer.

    Args:
        name: of the layer, for errors.
        by: see ``SplitLayers``.
        unit: see ``sharding.split_blocks``.

    Raises:
        ConfigError: the layer cannot be split into equal parts.
    """
    if by == WHOLE:
        return whole(shape)
    if by == ROWS:
        return Shard(whole(shape).experts, split_blocks(name, shape, parts, part, unit))
    if shape.num_experts % parts:
        raise ConfigError(
            f"{name}: {shape.num_experts} experts cannot be split over ep_size {parts}; use a size that "
            f"divides {shape.num_experts}"
        )
    each = shape.num_experts // parts
    return Shard(tuple(range(part * each, (part + 1) * each)), (0, shape.blocks))


def take_out_of_plans(model: Any, layers: Sequence[str], config: Any) -> str:
    """Remove the entries for experts from the model's plans.

    Args:
        layers: names of the experts' modules.

    Returns:
        what they are split by, see ``SplitLayers``.

    Raises:
        ConfigError: a plan of the caller's own names experts.
    """
    names = {_pattern(layer) for layer in layers}

    def is_expert(key: str) -> bool:
        return key in names or key.rpartition(".")[0] in names

    for kind in ("tp_plan", "ep_plan"):
        own = getattr(config, kind)
        named = sorted(filter(is_expert, own)) if isinstance(own, dict) else []
        if named:
            raise ConfigError(
                f"distributed_config: {kind} names {', '.join(named)}; how packed experts are split is not "
                "up to a plan, leave them out of it"
            )
    by_expert = config.ep_size > 1 and any(map(is_expert, model._ep_plan))
    by_rows = config.tp_size > 1 and config.tp_plan != {} and any(map(is_expert, model._tp_plan))
    for plan in (model._tp_plan, model._ep_plan):
        for key in list(filter(is_expert, plan)):
            del plan[key]
    if by_expert:  # an empty plan would be refused
        model._ep_plan.update(dict.fromkeys(names, _WITHOUT_EFFECT))
        return EXPERTS
    return ROWS if by_rows else WHOLE


def _pattern(name: str) -> str:
    """As plans name a module of every layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def summed_forward(
    forward: Callable[..., Tensor], group: Any, first: int, experts: int, hidden: Tensor, *routing: Tensor
) -> Tensor:
    """Output of the whole layer, on each of the processes that share the same tokens.

    Args:
        forward: of the part of this process.
        group: the processes.
        first: id of the first expert of this process in the whole layer.
        experts: number of experts of this process.
        hidden, routing: see ``BitsMoEExperts.routed``, with ids of the whole layer.
    """
    hidden = _SumOfGradients.apply(_local(hidden), group)
    if routing:
        index, weights = routing
        index = index - first
        index = torch.where((index >= 0) & (index < experts), index, -1)
        routing = index, _SumOfGradients.apply(_local(weights), group)
    return _Sum.apply(forward(hidden, *routing), group)  # type: ignore[no-any-return]


def _local(tensor: Tensor) -> Tensor:
    """All of a tensor that modules before this one may have left distributed."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class _Sum(torch.autograd.Function):
    """Sum over processes; all of them hold the gradient with respect to the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    """Identity; each process holds a part of the gradient, of its part of the layer."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
