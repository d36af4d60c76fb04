"""What a packed layer computes besides its rows: biases of down, and experts that are kept as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.gating import Gating
from bitsmoe_plugin.runtime import cpu_blocks
from bitsmoe_plugin.runtime.cpu_layer import CpuLayer

if TYPE_CHECKING:
    from bitsmoe_plugin.runtime.dispatch import Runtime


@dataclass(frozen=True)
class WithOriginals:
    """A runtime and what its layer stores unquantized.

    Attributes:
        runtime: computes the rows; of kept experts there are none, so they come out as zero.
        spec: sizes.
        gating: of the experts.
    """

    runtime: Runtime
    spec: PackedSpec
    gating: Gating

    @property
    def packed(self) -> PackedExperts:
        """The tensors that it computes from."""
        return self.runtime.packed

    @torch.no_grad()
    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``dispatch.Runtime``."""
        return self.compute(hidden, top_k_index, top_k_weights)

    def compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``forward``, as differentiable as that of ``runtime``."""
        out = self.runtime.forward(hidden, top_k_index, top_k_weights).float()
        weights = top_k_weights.float()
        if self.packed.output_bias is not None:
            out += self._bias_of_down(weights, top_k_index)
        for position, expert in enumerate(self.spec.kept):
            share = (weights * (top_k_index == expert)).sum(-1)
            if hidden.device.type == "cpu":
                tokens = torch.nonzero(share).flatten()
                if len(tokens):
                    out[tokens] += share[tokens, None] * self._kept(position, hidden[tokens])
            else:  # for all tokens: to look which are routed there would wait for the device
                out += share[:, None] * self._kept(position, hidden)
        return out.to(hidden.dtype)

    def _bias_of_down(self, weights: Tensor, top_k_index: Tensor) -> Tensor:
        """``[T, H]`` float32, slot by slot: how a product sums may follow the number of tokens."""
        assert self.packed.output_bias is not None
        stored = self.spec.original(self.packed.output_bias)
        here = (top_k_index >= 0) & (top_k_index < self.spec.shape.num_experts)
        chosen = torch.where(here, top_k_index, 0).long()
        shares = (weights * here).unbind(1)
        return sum(  # type: ignore[return-value]
            share[:, None] * stored[expert].float()
            for share, expert in zip(shares, chosen.unbind(1), strict=True)
        )

    def _kept(self, position: int, hidden: Tensor) -> Tensor:
        """Output ``[n, H]`` float32 of a kept expert, without the bias of down.

        Of the hidden states' and the weights' dtypes neither is rounded to the other. On a CPU a token's is
        the same bit by bit whatever tokens are computed with it.
        """
        stored_input, stored_output = self.packed.kept_input, self.packed.kept_output
        assert stored_input is not None
        assert stored_output is not None
        weights = self.spec.original(stored_input[position])
        if isinstance(self.runtime, CpuLayer):
            products = [cpu_blocks.product(hidden, weight) for weight in weights]
            h = cpu_blocks.gated(self.gating, torch.stack(self._biased(position, products), 1))
            return cpu_blocks.product(h, self.spec.original(stored_output[position]))
        dtype = torch.promote_types(hidden.dtype, weights.dtype)
        products = [(hidden.to(dtype) @ weight.to(dtype).T).float() for weight in weights]
        h = self.gating(*self._biased(position, products)).to(dtype)
        return (h @ self.spec.original(stored_output[position]).to(dtype).T).float()

    def _biased(self, position: int, products: list[Tensor]) -> list[Tensor]:
        """A kept expert's products with its biases, if it has any."""
        if self.packed.input_bias is None:
            return products
        biases = self.spec.original(self.packed.input_bias[self.spec.kept[position]]).float()
        return [product + bias for product, bias in zip(products, biases, strict=True)]
