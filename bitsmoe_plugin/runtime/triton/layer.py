"""Forward pass of a packed layer by Triton kernels; the contract of ``dispatch.Runtime``.

z = input basis x; rows of gate and up, or up; gating; rows of down; sum over the token's experts;
y = output basis c. Up to ``DECODE_TOKENS`` tokens by ``decode``, more by ``prefill``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launcher, run
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.gating import GatingForm
from bitsmoe_plugin.runtime.triton import decode, prefill
from bitsmoe_plugin.runtime.triton.basis import PackedBasis, multiply
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target, target_of

DECODE_TOKENS = 16
PREFILL_BYTES = 2**27
"""Most memory of the experts' outputs before they are summed, float32 ``[T, k, r]``; more tokens are
computed in chunks. For 8 experts per token and rank 2048: 2048 tokens."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TritonLayer:
    """A packed layer or shard, ready to compute.

    Attributes:
        packed: the tensors.
        state: its rows.
        input_basis: ``[n * r, H]``, n = 1 or 2.
        output_basis: ``[H, r]``.
        target: block sizes.
    """

    packed: PackedExperts
    state: LayerState
    input_basis: PackedBasis
    output_basis: PackedBasis
    target: Target

    @classmethod
    def prepare(
        cls, spec: PackedSpec, packed: PackedExperts, form: str, target: Target | None = None
    ) -> TritonLayer:
        """Derive what the kernels need, on the device of the packed tensors. Waits for the device.

        Args:
            form: text of the ``GatingForm``.
            target: what to build for; by default the device.

        Raises:
            ConfigError: a form that is not known.
        """
        bits, hidden = spec.basis_bits, spec.shape.hidden_size
        return cls(
            packed,
            LayerState.derive(spec, packed, GatingForm.parse(form)),
            PackedBasis.of(packed.input_basis, packed.input_scales, bits, hidden),
            PackedBasis.of(packed.output_basis, packed.output_scales, bits, spec.shape.rank),
            target or target_of(packed.payload.device),
        )

    @torch.no_grad()
    def forward(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, launch: Launcher = run
    ) -> Tensor:
        """Output of these experts. Waits for nothing, so it can be captured in a CUDA graph.

        Args:
            hidden: ``[T, H]`` float16, bfloat16 or float32.
            top_k_index: ``[T, k]`` integer; ids outside 0..E-1 are skipped.
            top_k_weights: ``[T, k]``.
            launch: see ``triton.target.Launcher``.

        Returns:
            ``[T, H]`` in the dtype of ``hidden``; of a shard, its part of the sum over shards. Sums
            are float32; above one token (bases) and ``DECODE_TOKENS`` (rows) the factors of the
            products are in the dtype of ``hidden``.

        Raises:
            ConfigError: hidden states of another dtype.
        """
        if hidden.dtype not in _DTYPES:
            raise ConfigError(f"hidden states are {hidden.dtype}; the Triton kernels take {_DTYPES}")
        tokens, slots = top_k_index.shape
        if tokens * slots == 0:
            return torch.zeros_like(hidden)
        chunk = max(DECODE_TOKENS, PREFILL_BYTES // (4 * slots * self.state.rank))
        given = hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
        if tokens <= chunk:
            return self._forward(*given, launch)
        parts = zip(*(tensor.split(chunk) for tensor in given), strict=True)
        return torch.cat([self._forward(x, ids, weights, launch) for x, ids, weights in parts])

    def _forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, launch: Launcher) -> Tensor:
        state, target = self.state, self.target
        z = multiply(hidden, self.input_basis, torch.float32, target, launch)
        if hidden.shape[0] <= DECODE_TOKENS:
            c = decode.coordinates(z, ids, weights, state, target, launch)
        else:
            operand = target.operand(hidden.dtype)
            c = prefill.coordinates(z, ids, weights, state, operand, target, launch)
        return multiply(c, self.output_basis, hidden.dtype, target, launch)
