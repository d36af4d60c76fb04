"""What a packed layer computes besides its rows: biases of down, and experts that are kept as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.gating import Gating

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
            here = (top_k_index >= 0) & (top_k_index < self.spec.shape.num_experts)
            bias = self.spec.original(self.packed.output_bias)[torch.where(here, top_k_index, 0).long()]
            out += ((weights * here)[:, None] @ bias.float()).squeeze(1)
        for position, expert in enumerate(self.spec.kept):
            share = (weights * (top_k_index == expert)).sum(-1)
            if hidden.device.type == "cpu":
                tokens = torch.nonzero(share).flatten()
                if len(tokens):
                    out[tokens] += share[tokens, None] * self._kept(position, hidden[tokens])
            else:  # for all tokens: to look which are routed there would wait for the device
                out += share[:, None] * self._kept(position, hidden)
        return out.to(hidden.dtype)

    def _kept(self, position: int, hidden: Tensor) -> Tensor:
        """Output ``[n, H]`` float32 of a kept expert, without the bias of down.

        Of the hidden states' and the weights' dtypes neither is rounded to the other.
        """
        stored_input, stored_output = self.packed.kept_input, self.packed.kept_output
        assert stored_input is not None
        assert stored_output is not None
        weights = self.spec.original(stored_input[position])
        dtype = torch.promote_types(hidden.dtype, weights.dtype)
        products = [(hidden.to(dtype) @ weight.to(dtype).T).float() for weight in weights]
        if self.packed.input_bias is not None:
            biases = self.spec.original(self.packed.input_bias[self.spec.kept[position]]).float()
            products = [product + bias for product, bias in zip(products, biases, strict=True)]
        h = self.gating(*products).to(dtype)
        return (h @ self.spec.original(stored_output[position]).to(dtype).T).float()
