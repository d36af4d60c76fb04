"""Forward pass of a packed layer by Triton kernels; the contract of ``dispatch.Runtime``.

z = input basis x; rows of gate and up, or up; gating; rows of down; sum over the token's experts;
y = output basis c. Few tokens by ``decode``, more by ``prefill``, see ``target.BlockSizes``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launcher, run
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.gating import Gating, GatingForm
from bitsmoe_plugin.runtime.triton import basis, decode, decode_output, expanded, matvec, prefill
from bitsmoe_plugin.runtime.triton.basis import PackedBasis
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target, target_of

PREFILL_BYTES = 2**29
"""Most memory of what is computed between the bases, see ``prefill.bytes_per_token``; more tokens are
computed in chunks. For 8 experts per token, rank 2048 and 768 hidden units: 3,400 tokens."""
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
        cls, spec: PackedSpec, packed: PackedExperts, gating: str | Gating, target: Target | None = None
    ) -> TritonLayer:
        """Derive what the kernels need, on the device of the packed tensors. Waits for the device.

        Args:
            gating: of the experts; a ``GatingForm``, or its text, is computed in kernels, another by torch.
            target: what to build for; by default the device.

        Raises:
            ConfigError: a form that is not known.
        """
        bits, hidden, grid = spec.basis_bits, spec.shape.hidden_size, spec.grid
        return cls(
            packed,
            LayerState.derive(spec, packed, GatingForm.parse(gating) if isinstance(gating, str) else gating),
            PackedBasis.of(packed.input_basis, packed.input_scales, bits, hidden, grid),
            PackedBasis.of(packed.output_basis, packed.output_scales, bits, spec.shape.rank, grid),
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
            are float32; of more than ``decode_tokens`` tokens the factors of the products are in the
            dtype of ``hidden``.

        Raises:
            ConfigError: hidden states of another dtype.
        """
        if hidden.dtype not in _DTYPES:
            raise ConfigError(f"hidden states are {hidden.dtype}; the Triton kernels take {_DTYPES}")
        tokens, slots = top_k_index.shape
        if tokens * slots == 0:
            return torch.zeros_like(hidden)
        given = hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
        if tokens <= self.target.blocks.decode_tokens:
            return self._decode(*given, launch)
        chunks = self._chunks(tokens, slots, self.target.operand(hidden.dtype))
        if len(chunks) == 1:
            return self._prefill(*given, launch)
        parts = zip(*(tensor.split(chunks) for tensor in given), strict=True)
        return torch.cat([self._prefill(x, ids, weights, launch) for x, ids, weights in parts])

    def _chunks(self, tokens: int, slots: int, operand: torch.dtype) -> list[int]:
        """Numbers of tokens to compute one after the other: equal ones, or full ones where experts are
        expanded for these alone."""
        state, target = self.state, self.target

        def most(n: int) -> int:
            return max(1, PREFILL_BYTES // prefill.bytes_per_token(state, slots, n, operand, target))

        chunks: list[int] = []
        while tokens:
            full = min(tokens, most(tokens))
            equal = -(-tokens // -(-tokens // full))
            expands = [target.expands(n * slots, state.experts, operand) for n in (full, equal)]
            chunk = equal if expands[0] == expands[1] else full
            chunks.append(min(chunk, most(chunk)))  # each takes more where experts are not expanded
            tokens -= chunks[-1]
        return chunks

    def working_bytes(self, tokens: int, slots: int, dtype: torch.dtype) -> int:
        """Device memory that ``forward`` takes at most besides its inputs and output, without the bases'."""
        state, target, operand = self.state, self.target, self.target.operand(dtype)
        each = prefill.bytes_per_token(state, slots, tokens, operand, target)
        scratch = 0
        if target.expands(tokens * slots, state.experts, operand):
            scratch = expanded.scratch_bytes(state, operand, target)
        return scratch + min(tokens * each, max(each, PREFILL_BYTES))

    def _decode(self, hidden: Tensor, ids: Tensor, weights: Tensor, launch: Launcher) -> Tensor:
        state, target, basis_out = self.state, self.target, self.output_basis
        arrived = ids.new_empty(1, dtype=torch.int32)
        scaled = matvec.scaled(hidden, ids, self.input_basis, arrived, state, target, launch)
        units = decode.hidden_units(scaled, ids, state, target, launch)
        given = units, ids, weights, basis_out, arrived, hidden.dtype
        return decode_output.outputs(*given, state, target, launch)

    def _prefill(self, hidden: Tensor, ids: Tensor, weights: Tensor, launch: Launcher) -> Tensor:
        state, target = self.state, self.target
        operand = target.operand(hidden.dtype)
        dtype = operand if target.expands(ids.numel(), state.experts, operand) else torch.float32
        z = basis.multiply(hidden, self.input_basis, dtype, target, launch)
        c = prefill.coordinates(z, ids, weights, state, operand, target, launch)
        return basis.multiply(c, self.output_basis, hidden.dtype, target, launch)
