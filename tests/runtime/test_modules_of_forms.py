"""Packed modules of experts of other forms than most, against the modules that they stand for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LongcatFlashConfig, NemotronHConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from triton_support import random_layer, relative_error

from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.families import fused_parameters, layer_shape
from bitsmoe_plugin.runtime.decoding import decode_biases, decode_weights
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

E, H, SIZE = 4, 32, 48


def originals() -> dict[str, Any]:
    sizes = {"hidden_size": H, "moe_intermediate_size": SIZE, "n_routed_experts": E}
    longcat = LongcatFlashConfig(hidden_size=H, expert_ffn_hidden_size=SIZE, n_routed_experts=E)
    longcat.zero_expert_num = 2
    muse = MuseSparkTextConfig(num_local_experts=E, moe_hidden_size=H, moe_intermediate_size=SIZE)
    return {
        "no gate": NemotronHExperts(NemotronHConfig(**sizes)),
        "norm": MuseSparkExperts(muse),
        "identity": LongcatFlashExperts(longcat),
        "clamp": Step3p7Experts(Step3p7TextConfig(**sizes), swiglu_limit=0.5),
    }


FORMS = ["no gate", "norm", "identity", "clamp"]


def packed_and_twin(form: str) -> tuple[BitsMoEExperts, nn.Module]:
    """Packed experts with random content, and the original module with the weights that they stand for."""
    original = originals()[form]
    if form == "norm":
        original.post_expert_norm.weight.data.normal_(std=0.3)
    spec, packed = random_layer(layer_shape(original), basis_bits=8)
    module, twin = BitsMoEExperts(original, spec), copy.deepcopy(original)
    module.load_packed(packed)
    weights = decode_weights(spec, packed, torch.float32)
    for name, tensor in fused_parameters(twin, weights, decode_biases(spec, packed, torch.float32)).items():
        assert tensor.shape == getattr(twin, name).shape
        setattr(twin, name, nn.Parameter(tensor))
    return module, twin


def inputs(form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of every kind: of identity experts, and the sentinel of transformers for experts elsewhere."""
    index = torch.stack([torch.randperm(E + 2 if form == "identity" else E)[:3] for _ in range(11)])
    if form in ("norm", "clamp"):  # Nemotron-H's own loop does not know it
        index[3, 1] = E
    return torch.randn(11, H, requires_grad=True), index, torch.rand(11, 3, requires_grad=True)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_the_original(form: str) -> None:
    """Guards what is computed beside the operator, in both directions, and by the compiler."""
    module, twin = packed_and_twin(form)
    hidden, index, weights = inputs(form)
    if form == "norm":
        module.post_expert_norm, twin.post_expert_norm = (
            m.post_expert_norm.requires_grad_() for m in (module, twin)
        )
    wanted, found = twin(hidden, index, weights), module(hidden, index, weights)
    assert relative_error(found, wanted) < 5e-6
    grad = torch.randn_like(found)
    sources = [hidden, weights]
    slopes = [torch.autograd.grad(out, sources, grad, retain_graph=True) for out in (found, wanted)]
    for a, b in zip(*slopes, strict=True):
        assert relative_error(a, b) < 5e-5
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, index, weights), found)
    if form == "norm":
        both = [
            torch.autograd.grad(out, m.post_expert_norm.weight, grad)[0]
            for out, m in ((found, module), (wanted, twin))
        ]
        assert relative_error(*both) < 5e-5


def test_a_norm_is_loaded_and_saved_with_the_experts() -> None:
    """Guards the refusal of tensors that packed experts do not have: the norm's they have."""
    module, _ = packed_and_twin("norm")
    state = module.state_dict()
    assert "post_expert_norm.weight" in state
    state["post_expert_norm.weight"] = torch.full((H,), 0.25)
    module.load_state_dict(state)
    assert torch.equal(module.original.post_expert_norm.weight, torch.full((H,), 0.25))
    with pytest.raises(CheckpointError, match=r"gate_up_proj cannot be loaded"):
        module.load_state_dict({**state, "gate_up_proj": torch.zeros(E, 2 * SIZE, H)})


def test_manifests_that_contradict_the_model_are_refused() -> None:
    """Guards kernels against a number of factors that is not that of the tensors."""
    module, _ = packed_and_twin("no gate")
    gated = replace(module.spec, shape=replace(module.spec.shape, has_gate=True))
    other = BitsMoEExperts(originals()["clamp"], gated)
    with pytest.raises(CheckpointError, match="row_codes"):
        other.load_state_dict(module.state_dict())
