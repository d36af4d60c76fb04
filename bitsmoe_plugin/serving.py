"""Forward pass of a packed layer that keeps nothing else in memory.

``BitsMoEExperts`` keeps the order of all rows and their scales, which takes memory; here they are
derived at each call for the experts that the call's tokens chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bitsmoe_plugin import packing
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.experts import PackedSpec
from bitsmoe_plugin.kernels.reference import moe_forward
from bitsmoe_plugin.packing import LayerShape, PackedExperts
from bitsmoe_plugin.statistics import Gating

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def gating(activation: str) -> Gating:
    """``activation(gate) * up`` by name.

    Raises:
        ConfigError: an activation that is not known here.
    """
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"experts with activation {activation!r} are not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    act = _ACTIVATIONS[activation]
    return lambda gate, up: act(gate) * up


@dataclass(frozen=True)
class PackedLayer:
    """A packed layer or shard, ready to compute.

    Attributes:
        spec: sizes.
        packed: the tensors.
        starts: ``[3][E]`` first payload word of every (factor, expert).
        gating: of the experts.
    """

    spec: PackedSpec
    packed: PackedExperts
    starts: list[list[int]]
    gating: Gating

    @classmethod
    def prepare(cls, spec: PackedSpec, packed: PackedExperts, gating: Gating) -> PackedLayer:
        """Derive the offsets from the row codes."""
        starts = packing.index_rows(packed.row_codes.cpu(), spec.widths, spec.shape).starts
        return cls(spec, packed, starts, gating)

    @torch.no_grad()
    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Output of these experts, the reference in pure torch.

        Args:
            hidden: ``[T, H]``.
            top_k_index: ``[T, k]`` integer; ids outside 0..E-1 are skipped.
            top_k_weights: ``[T, k]``.

        Returns:
            ``[T, H]`` in the dtype of ``hidden``; of a shard, its part of the sum over shards.
        """
        used = [e for e in torch.unique(top_k_index).tolist() if 0 <= e < self.spec.shape.num_experts]
        if not used:
            return torch.zeros_like(hidden)
        shape, packed = self.spec.shape, self.packed
        row_codes = packed.row_codes[:, used]
        index = packing.index_rows(
            row_codes,
            self.spec.widths,
            LayerShape(len(used), shape.hidden_size, shape.intermediate_size),
        )
        index = replace(index, starts=[[starts[e] for e in used] for starts in self.starts])
        return moe_forward(
            hidden,
            _positions(used, top_k_index),
            top_k_weights,
            payload=packed.payload,
            index=index,
            scales=packing.row_scales(row_codes, packed.scale_grid),
            input_basis=self._basis(packed.input_basis, packed.input_scales),
            output_basis=self._basis(packed.output_basis, packed.output_scales),
            intermediate_size=shape.intermediate_size,
            grid=self.spec.grid,
            gating=self.gating,
        )

    def _basis(self, words: Tensor, scales: Tensor) -> Tensor:
        return packing.unpack_basis(words, scales, self.spec.basis_bits, self.spec.shape.hidden_size)


def _positions(used: list[int], index: Tensor) -> Tensor:
    """``index`` with each id replaced by its position in ``used`` (rising), -1 if it is not there."""
    ids = torch.tensor(used, device=index.device)
    position = torch.searchsorted(ids, index.long()).clamp_max(len(used) - 1)
    return torch.where(ids[position] == index, position, -1)
