"""The runtime module that takes the place of a model's routed experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_plugin.codec import packed_values
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError, QuantizationError
from bitsmoe_plugin.models.families import apply_gating, layout_of
from bitsmoe_plugin.runtime import dispatch, transforms
from bitsmoe_plugin.runtime.layer_kind import LayerKind
from bitsmoe_plugin.runtime.layer_states import STATES
from bitsmoe_plugin.runtime.operator import packed_experts, routed_only


class BitsMoEExperts(nn.Module):
    """Routed experts computed from their packed tensors; called like the module it replaces.

    Differentiable in hidden states and router weights. The packed tensors are parameters that are not
    trained: what offloads, moves and counts weights takes buffers for something small. They hold integers,
    so they keep their dtypes when a model is cast.
    """

    def __init__(self, original: nn.Module, spec: PackedSpec) -> None:
        """
        Args:
            original: the fused experts module, for its gating.
            spec: sizes of the packed tensors, which are created uninitialised on the meta device.
        """
        super().__init__()
        # In a tuple, so that it is no submodule and its parameters are not ours.
        self._original = (original,)
        layout = layout_of(original)
        # A module of the model's like any other: loaded, moved, trained and saved with it.
        norm: Any = original.post_expert_norm if layout.has_post_expert_norm else None
        self.post_expert_norm: nn.Module | None = norm
        self._has_identity_experts = layout.has_identity_experts
        self.spec = spec
        self.whole_shape = spec.shape  # also where a shard is loaded, whose spec is smaller
        self.num_experts = spec.shape.num_experts
        for name, (dtype, shape) in spec.tensors().items():
            self._store(name, torch.empty(shape, dtype=dtype, device="meta"))
        self._runtime: dispatch.Runtime | None = None

    @property
    def spec(self) -> PackedSpec:
        """Sizes of the packed tensors."""
        return self._spec

    @spec.setter
    def spec(self, spec: PackedSpec) -> None:
        self._spec, self._names = spec, tuple(spec.tensors())
        kind = LayerKind.describe(spec, self._original[0])
        self._kind, self._takes_copies = kind.text(), kind.takes_copies

    @property
    def original(self) -> nn.Module:
        """The replaced module."""
        return self._original[0]

    def drop_original_weights(self) -> None:
        """Free the parameters of the replaced module; its gating stays."""
        for name in list(dict(self._original[0].named_parameters(recurse=False))):
            delattr(self._original[0], name)

    def load_packed(self, packed: PackedExperts) -> None:
        """Take over packed tensors."""
        for name, tensor in packed.tensors():
            self._store(name, tensor)
        self._leave_inference_mode()

    def _store(self, name: str, tensor: Tensor) -> None:
        setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def _leave_inference_mode(self) -> None:
        """Have tensors that count their versions and can be saved for a backward pass."""
        with torch.inference_mode(False):
            for name in self._names:
                if self.get_parameter(name).is_inference():
                    self._store(name, self.get_parameter(name).clone())

    def _apply(self, fn: Any, recurse: bool = True) -> BitsMoEExperts:
        """Of moves to devices and casts of a model."""
        super()._apply(fn, recurse)
        self._leave_inference_mode()
        return self

    def packed(self) -> PackedExperts:
        """The packed tensors as they are stored."""
        return PackedExperts(
            **{name.removeprefix("bitsmoe_"): self.get_parameter(name) for name in self._names}
        )

    def verify(self, name: str) -> None:
        """Refuse tensors that do not fit the spec; their values are checked by ``packed_values``.

        Args:
            name: module path, for errors.

        Raises:
            CheckpointError: naming the tensor and both values.
        """
        packed_values.check_sizes(name, self.spec, self.packed())
        self._leave_inference_mode()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Notes in torch's metadata of the state what its tensors do not say: grid, widths, kept experts."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.setdefault(prefix[:-1], {})[_SPEC] = self.spec.meaning()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Refuses what would not compute, and what would be left out, before anything is overwritten.

        Raises:
            CheckpointError: naming the tensor, or both ways of packing.
        """
        packed_values.check_meaning(prefix.rstrip("."), self.spec, local_metadata.get(_SPEC))
        own = {*self._names, *(f"{_NORM}.{name}" for name in self._norm_state())}
        others = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)} - own
        if others:  # weights of unquantized experts, or adapters on them
            raise CheckpointError(
                f"{prefix}{min(others)} cannot be loaded: these experts are packed and have none. Load it "
                "into the unquantized model"
            )
        given = {name: state_dict.get(prefix + name, self.get_parameter(name)) for name in self._names}
        if not any(tensor.is_meta for tensor in given.values()):
            packed = PackedExperts(**{name.removeprefix("bitsmoe_"): given[name] for name in given})
            packed_values.check_sizes(prefix.rstrip("."), self.spec, packed)
            packed_values.check_packed(prefix.rstrip("."), self.spec, packed)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._leave_inference_mode()

    def requires_grad_(self, requires_grad: bool = True) -> BitsMoEExperts:
        """Refuses what would train nothing; a model's ``requires_grad_`` does not come here.

        Raises:
            QuantizationError: asked to train the experts.
        """
        if requires_grad:
            raise QuantizationError(
                "packed experts cannot be trained: they have no parameters. Train other modules, for example "
                "LoRA adapters on attention, or the unquantized model"
            )
        return self

    def compute_by(self, runtime: dispatch.Runtime | None) -> None:
        """Compute by another runtime of the same packed tensors; None: by the fastest, as ever."""
        self._runtime = runtime

    def gating(self, *products: Tensor) -> Tensor:
        """``[..., I]`` of gate's and up's (or up's) outputs alike, as the replaced module has it."""
        return apply_gating(self._original[0], *products)

    def runtime(self) -> dispatch.Runtime:
        """What computes the layer.

        Raises:
            CheckpointError: the packed tensors are not those that ``compute_by`` was given a runtime of, or
                do not fit one another.
        """
        if self._runtime is None:
            return STATES.of(self._kind, self._tensors(), 0).runtime
        given = self._runtime.packed.tensors()
        if any(a is not b for a, (_, b) in zip(self._tensors(), given, strict=True)):
            raise CheckpointError(
                "packed tensors were replaced, but are to be computed by a runtime of the former ones; call "
                "compute_by(None)"
            )
        return self._runtime

    def _tensors(self) -> list[Tensor]:
        # Looked up by ``get_parameter`` they would take as long as the operator's call.
        parameters: dict[str, Any] = self._parameters
        return [parameters[name] for name in self._names]

    def _norm_state(self) -> dict[str, Any]:
        return {} if self.post_expert_norm is None else self.post_expert_norm.state_dict()

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """``[T, H]`` from ``[T, H]`` and, as routing, ``[T, k]`` and ``[T, k]``, see ``dispatch``.

        ``[E * T, H]`` from ``[E * T, H]`` for families that pass one copy per expert (``families.Layout``).
        """
        if self.post_expert_norm is not None:
            return self._normed(hidden_states, *routing)
        out = self.routed(hidden_states, *routing)
        if not self._has_identity_experts:
            return out
        index, weights = routing
        share = (weights * (index >= self.whole_shape.num_experts)).sum(-1, keepdim=True)
        return out + (share * hidden_states).to(out.dtype)

    def _normed(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Each expert's output by itself, through the norm, and then weighted and summed."""
        assert self.post_expert_norm is not None
        pairs = hidden.repeat_interleave(index.shape[1], 0)
        single = self.routed(pairs, index.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
        here = (index >= 0) & (index < self.whole_shape.num_experts)
        each = self.post_expert_norm(single).view(*index.shape, -1)
        return (each * (weights * here)[..., None]).sum(1).to(hidden.dtype)

    def routed(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """What the packed tensors compute of ``forward``."""
        index, weights = self._routing_of_copies(hidden_states) if self._takes_copies else routing
        if self._runtime is None:
            transformed = not torch.compiler.is_compiling() and transforms.active()
            compute = transforms.packed_experts if transformed else packed_experts
            return compute(hidden_states, index, weights, self._tensors(), self._kind)  # type: ignore[no-any-return]
        if self._takes_copies:
            return routed_only(self.runtime().forward, hidden_states, index, weights)
        return self.runtime().forward(hidden_states, index, weights)

    def _routing_of_copies(self, copies: Tensor) -> tuple[Tensor, Tensor]:
        """Each copy that is not zero is a token of its own; the others have no expert, -1."""
        experts = torch.arange(self.num_experts, device=copies.device)[:, None]
        index = experts.expand(-1, copies.shape[0] // self.num_experts).reshape(-1)
        index = torch.where(copies.ne(0).any(-1), index, -1)[:, None]
        return index, torch.ones_like(index, dtype=copies.dtype)

    def extra_repr(self) -> str:
        shape = self.spec.shape
        bits = self.packed().stored_bits() / shape.weights
        return (
            f"num_experts={shape.num_experts}, hidden_size={shape.hidden_size}, "
            f"intermediate_size={shape.intermediate_size}, bits_per_weight={bits:.3f}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_runtime": None}  # it holds pointers

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.spec = self._spec  # the name of its gating can be another in this process


_NORM, _SPEC = "post_expert_norm", "bitsmoe_spec"


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at path ``name`` of ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
