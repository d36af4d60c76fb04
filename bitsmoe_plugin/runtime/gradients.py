"""Gradients of packed experts with respect to hidden states and router weights; pure torch, float32.

With z = A x (A: input basis), h = gating(G z, U z), y = B c, c = sum of p D h over the token's experts:

    dc = B' dy                              v = D' dc of each (token, expert)
    dp = <h, v>                             (dgate, dup) = gating'(p v)
    dz = sum of G' dgate + U' dup           dx = A' dz

Experts without a gate have no G.

Everything is computed again from the packed tensors, the rows of one expert at a time, so nothing but the
inputs has to be kept from the forward pass. The rounding of inputs in the kernels counts as the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.runtime.reference_layer import ReferenceLayer

TOKENS = 4096
"""Tokens computed at a time; bounds intermediate results, a few times float32 ``[tokens, r]``."""


def gradients(
    layer: ReferenceLayer, grad: Tensor, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the layer's output, biases and kept experts included.

    Args:
        grad: ``[T, H]`` with respect to the output.
        hidden: ``[T, H]``.
        top_k_index: ``[T, k]`` integer; ids outside 0..E-1 are skipped.
        top_k_weights: ``[T, k]``.

    Returns:
        with respect to ``hidden`` and to ``top_k_weights``, in their shapes and dtypes, contiguous.
    """
    by_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    by_weights = torch.zeros(top_k_weights.shape, dtype=top_k_weights.dtype, device=hidden.device)
    bases = layer.bases()
    for start in range(0, len(hidden), TOKENS):
        part = slice(start, start + TOKENS)
        inputs = (tensor[part] for tensor in (grad, hidden, top_k_index, top_k_weights))
        by_hidden[part], by_weights[part] = _Chunk.of(layer, bases, *inputs).gradients()
    return by_hidden, by_weights


@dataclass
class _Chunk:
    """Some tokens. All tensors but ``index`` are float32.

    Attributes:
        z: ``[T, n, r]`` coordinates of the hidden states in the n input bases.
        dc: ``[T, r]`` gradient with respect to the output's coordinates.
        dz, dx, dp: sums so far.
    """

    layer: ReferenceLayer
    input_basis: Tensor
    dy: Tensor
    x: Tensor
    index: Tensor
    p: Tensor
    z: Tensor
    dc: Tensor
    dz: Tensor
    dx: Tensor
    dp: Tensor

    @classmethod
    def of(
        cls,
        layer: ReferenceLayer,
        bases: tuple[Tensor, Tensor],
        grad: Tensor,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
    ) -> _Chunk:
        dy, x, p = grad.float(), hidden.float(), weights.float()
        z = (x @ bases[0].T).unflatten(-1, (-1, bases[1].shape[1]))
        zeros = torch.zeros_like(z), torch.zeros_like(x), torch.zeros_like(p)
        return cls(layer, bases[0], dy, x, index, p, z, dy @ bases[1], *zeros)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """With respect to hidden states and router weights."""
        spec = self.layer.spec
        used = [e for e in torch.unique(self.index).tolist() if 0 <= e < spec.shape.num_experts]
        rows = [expert for expert in used if expert not in spec.kept]
        rows_of, factors = self.layer.rows_of(rows) if rows else None, range(len(spec.shape.factors))
        for expert in used:
            token, slot = torch.where(self.index == expert)
            if expert in spec.kept:
                self._add_kept(expert, token, slot)
            elif rows_of is not None:
                position = rows.index(expert)
                self._add_rows(expert, [rows_of(f, position) for f in factors], token, slot)
            if self.layer.packed.output_bias is not None:
                bias = spec.original(self.layer.packed.output_bias)[expert].float()
                self.dp[token, slot] += self.dy[token] @ bias
        return self.dx.addmm_(self.dz.flatten(1), self.input_basis), self.dp

    def _add_rows(self, expert: int, rows: list[tuple[Tensor, Tensor]], token: Tensor, slot: Tensor) -> None:
        """What one expert contributes; ``rows`` are those of each factor with their rank indices."""
        *inputs, (down_rows, down_order) = rows
        z, dz = self.z[token], self.z.new_zeros((len(token), *self.z.shape[1:]))
        v = self.dc[token[:, None], down_order] @ down_rows
        # The last basis is up's, and the first gate's: the same where there is one.
        products = [z[:, -factor, order] @ own for factor, (own, order) in enumerate(inputs)]
        slopes = self._through_gating(expert, products, v, token, slot)
        for factor, (slope, (own, order)) in enumerate(zip(slopes, inputs, strict=True)):
            dz[:, -factor, order] += slope @ own.T
        self.dz.index_add_(0, token, dz)

    def _add_kept(self, expert: int, token: Tensor, slot: Tensor) -> None:
        """As ``_add_rows``, of an expert that is stored as it was."""
        spec, packed = self.layer.spec, self.layer.packed
        assert packed.kept_input is not None
        assert packed.kept_output is not None
        position, x = spec.kept.index(expert), self.x[token]
        inputs = spec.original(packed.kept_input[position]).float()
        v = self.dy[token] @ spec.original(packed.kept_output[position]).float()
        slopes = self._through_gating(expert, [x @ weight.T for weight in inputs], v, token, slot)
        for slope, weight in zip(slopes, inputs, strict=True):
            self.dx.index_add_(0, token, slope @ weight)

    def _through_gating(
        self, expert: int, products: list[Tensor], v: Tensor, token: Tensor, slot: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients ``[n, I]`` of gate and up, or up; notes that with respect to the router weight.

        Args:
            products: of gate and up, or up, ``[n, I]`` without biases.
            v: ``[n, I]``, gradient with respect to the gating's output at router weight 1.
        """
        if self.layer.packed.input_bias is not None:
            bias = self.layer.spec.original(self.layer.packed.input_bias)[expert].float()
            products = [product + own for product, own in zip(products, bias, strict=True)]
        # Of torch.func, because autograd is switched off where operators are computed.
        h, pull_back = torch.func.vjp(self.layer.gating, *products)  # type: ignore[misc]
        self.dp[token, slot] += (h * v).sum(-1)
        slopes: tuple[Tensor, ...] = pull_back(self.p[token, slot, None] * v)
        return slopes
