"""Gradients through packed experts, beside those of the unquantized module with the decoded weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_twin import E, H, decode_into, packed_and_twin, relative
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bitsmoe_plugin.errors import CheckpointError, QuantizationError
from bitsmoe_plugin.runtime import gradients
from bitsmoe_plugin.runtime.experts import BitsMoEExperts
from bitsmoe_plugin.runtime.layer_states import STATES

TOLERANCE = 2e-5
"""Gradients are float32 sums; in front of them are a layer's inputs, exact here."""


def routing(case: str) -> Tensor:
    """``[T, k]`` expert ids."""
    index = torch.rand(33, E).argsort(1)[:, :2]
    if case == "one expert":
        index[:] = torch.tensor([3, 1])
        return index[:, :1]
    if case == "duplicates":
        index[:, 1] = index[:, 0]
    if case == "outside":
        index[::3, 0], index[1::3, 1] = -1, E
        index[5] = -1
    if case == "empty experts":
        index = index % 2 + 2
        index[:, 1] = 5 - index[:, 0]
    return index[:1] if case == "one token" else index


def gradients_of(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, and gradients with respect to hidden states and router weights."""
    hidden, weights = (t.detach().clone().requires_grad_() for t in (hidden, weights))
    out = module(hidden, index, weights)
    out.backward(dy)
    return [out, hidden.grad, weights.grad]


def compare(module: Any, twin: Any, index: Tensor) -> None:
    hidden, weights, dy = torch.randn(len(index), H), torch.rand(index.shape), torch.randn(len(index), H)
    here = (index >= 0) & (index < E)
    # The families' own modules know no ids outside; at weight 0 they add nothing.
    twin_inputs = hidden, index.where(here, 0), weights * here, dy
    found, wanted = gradients_of(module, hidden, index, weights, dy), gradients_of(twin, *twin_inputs)
    # The kernels round their inputs to 16 bits.
    assert relative(found[0], wanted[0]) < 1e-3
    assert relative(found[1], wanted[1]) < TOLERANCE
    assert relative(found[2], wanted[2] * here) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["random", "one expert", "duplicates", "outside", "empty experts", "one token"]
)
def test_gradients_are_those_of_the_decoded_weights(case: str) -> None:
    """Guards against tokens that are dropped, counted twice or given another's gradient."""
    compare(*packed_and_twin("qwen3_moe"), routing(case))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"grid": "uniform", "basis_bits": 8, "input_bases": 2}),
        ("qwen3_moe", {"basis_bits": 16, "input_bases": 2, "widths": (0, 2, 16)}),
        ("qwen3_moe", {"grid": "tiled", "basis_bits": 16, "widths": (0, 1, 2, 4)}),
        ("qwen3_moe", {"kept": (1, 3)}),
        ("gpt_oss", {}),
        ("gpt_oss", {"kept": (0,), "original_dtype": "float32", "input_bases": 2}),
    ],
    ids=str,
)
def test_gradients_of_every_form_of_layer(family: str, options: dict[str, Any]) -> None:
    """Guards grids, two input bases, kept experts, biases and GPT-OSS' clamped gating."""
    compare(*packed_and_twin(family, **options), routing("random"))


def test_gradients_of_one_copy_per_expert() -> None:
    """Llama4 passes a copy of the hidden states to each expert, zero where a token is not routed."""
    module, twin = packed_and_twin("llama4_text")
    copies = torch.zeros(E, 7, H)
    copies[torch.arange(7) % 4, torch.arange(7)] = torch.randn(7, H)  # the last expert has no token
    found, wanted = copies.flatten(0, 1).requires_grad_(), copies.flatten(0, 1).clone().requires_grad_()
    dy = torch.randn(E * 7, H)
    out, expected = module(found), twin(wanted)
    out.backward(dy)
    expected.backward(dy)
    assert relative(out, expected) < 1e-3
    assert relative(found.grad, wanted.grad) < TOLERANCE


def test_tokens_come_in_chunks(monkeypatch) -> None:
    """Guards the bound of the memory: every token is in one chunk, with its own routing."""
    monkeypatch.setattr(gradients, "TOKENS", 10)
    compare(*packed_and_twin("qwen3_moe", kept=(2,)), routing("random"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_come_in_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    """Guards mixed dtypes: router weights are float32 in most models, hidden states are not."""
    module, twin = packed_and_twin("qwen3_moe")
    index = routing("random")
    hidden, weights = torch.randn(len(index), H).to(dtype), torch.rand(index.shape)
    dy = torch.randn(len(index), H).to(dtype)
    out, by_hidden, by_weights = gradients_of(module, hidden, index, weights, dy)
    assert (out.dtype, by_hidden.dtype, by_weights.dtype) == (dtype, dtype, torch.float32)
    wanted = gradients_of(twin, hidden.float(), index, weights, dy.float())
    assert relative(by_hidden, wanted[1]) < (5e-3 if dtype != torch.float64 else TOLERANCE)
    assert relative(by_weights, wanted[2]) < TOLERANCE


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    """Guards frozen routers and frozen inputs, and that packed tensors never ask for one."""
    module, _ = packed_and_twin("qwen3_moe")
    index = routing("random")
    hidden, weights = torch.randn(len(index), H), torch.rand(index.shape)
    assert not module(hidden, index, weights).requires_grad
    asking = weights.clone().requires_grad_()
    module(hidden, index, asking).sum().backward()
    assert asking.grad.abs().sum() > 0
    asking = hidden.clone().requires_grad_()
    module(asking, index, weights).sum().backward()
    assert asking.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(QuantizationError, match="packed experts cannot be trained"):
        module.requires_grad_()


def test_second_derivatives_and_forward_mode_are_refused() -> None:
    """Guards against derivatives of zero where there is no formula; torch.func.grad has one."""
    module, twin = packed_and_twin("qwen3_moe")
    index = routing("random")
    hidden, weights = torch.randn(len(index), H), torch.rand(index.shape)
    asking = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module(asking, index, weights).sum(), asking, create_graph=True)
    with pytest.raises(NotImplementedError, match="packed experts have first derivatives only"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: module(x, index, weights), (hidden,), (hidden,))
    level = torch.autograd.forward_ad
    with level.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        module(level.make_dual(hidden, hidden), index, weights)
    found, wanted = (
        torch.func.grad(lambda x, m=m: m(x, index, weights).sum())(hidden) for m in (module, twin)
    )
    assert relative(found, wanted) < TOLERANCE


def test_tensors_written_to_before_the_backward_pass_are_noticed() -> None:
    """Guards against gradients of another layer than that of the forward pass."""
    module, _ = packed_and_twin("qwen3_moe")
    hidden = torch.randn(33, H, requires_grad=True)
    out = module(hidden, routing("random"), torch.rand(33, 2))
    module.bitsmoe_payload.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.fixture(scope="module")
def pair(packed_moe_tiny, moe_tiny_path) -> tuple[Any, Any]:
    """The packed model and an unquantized one of the decoded weights, float32."""
    packed, twin = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (packed_moe_tiny, moe_tiny_path)
    )
    for name, module in packed.named_modules():
        if isinstance(module, BitsMoEExperts):
            decode_into(module, twin.get_submodule(name))
    return packed, twin


IDS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(5))


def model_gradients(model: Any, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {n: grad for n, grad in found.items() if "experts" not in n}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    assert any("mlp.gate" in name for name in found)
    return max(relative(found[name], wanted[name]) for name in found)


def test_gradients_of_a_model_are_those_of_the_decoded_model(pair, monkeypatch) -> None:
    """All that is not an expert, routers among them; with activation checkpointing and mixed precision."""
    packed, twin = pair
    wanted = model_gradients(twin)
    assert worst(found := model_gradients(packed), wanted) < 5e-3  # inputs rounded to 16 bits
    for reentrant in (True, False):
        packed.train()
        packed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        packed.enable_input_require_grads()
        assert worst(model_gradients(packed), found) < 1e-6
        packed.gradient_checkpointing_disable()
        packed.disable_input_require_grads()
        packed.eval()
    rounding = worst(model_gradients(twin, autocast=True), wanted)  # of the dense model itself
    assert worst(model_gradients(packed, autocast=True), wanted) < 2 * rounding


def lora(model: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():  # peft starts at zero, so that half have no gradient
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return adapted


def test_adapters_train_with_the_gradients_of_the_decoded_model(pair, tmp_path) -> None:
    """LoRA on attention, by Trainer: it starts, the loss falls, the adapter is saved and loaded."""
    packed, twin = (lora(model) for model in pair)
    found, wanted = ({}, {})
    for model, grads in ((packed, found), (twin, wanted)):
        model.eval()
        model(IDS, labels=IDS).loss.backward()
        grads |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    assert found.keys() == wanted.keys()
    assert all("lora" in name for name in found)
    assert max(relative(found[name], wanted[name]) for name in found) < 5e-3
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=5, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(packed, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    packed.eval()
    packed.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = packed(IDS).logits
        again = PeftModel.from_pretrained(packed.unload(), tmp_path / "adapter")(IDS).logits
    assert torch.equal(trained, again)
    twin.unload()


def test_adapters_train_in_several_processes(pair, tmp_path) -> None:
    """DistributedDataParallel sends all buffers, but gloo and NCCL no 16-bit integers: guards its start, as
    it wraps a model, one with adapters, and one that is compiled."""
    packed = pair[0]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        adapted = lora(packed)
        for model in (adapted, torch.compile(adapted, backend="eager")):
            parallel = DistributedDataParallel(model)
            assert not any(buffer.dtype == torch.int16 for buffer in parallel.modules_buffers)
        DistributedDataParallel(adapted)(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora" in n)
        packed = adapted.unload()
        packed.requires_grad_(True)
        DistributedDataParallel(packed)
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_on_the_experts_are_refused(pair, tmp_path) -> None:
    """Guards against adapters that are given for the experts and quietly left out."""
    packed, twin = pair
    with pytest.raises(ValueError, match=r"Target module BitsMoEExperts\(.* is not supported"):
        get_peft_model(packed, LoraConfig(target_modules=["experts"]))
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(packed, LoraConfig(target_parameters=["mlp.experts.gate_up_proj"]))
    on_experts = LoraConfig(
        r=2, target_modules=["k_proj"], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(twin, on_experts)
    adapted.save_pretrained(tmp_path / "dense-adapter")
    adapted.unload()
    with (
        pytest.warns(RuntimeWarning, match="target_parameters"),
        pytest.raises(
            CheckpointError, match=r"mlp\.experts\.lora_.* cannot be loaded: these experts are packed"
        ),
    ):
        PeftModel.from_pretrained(packed, tmp_path / "dense-adapter")


def test_states_go_with_their_tensors() -> None:
    """Guards against a process that keeps the memory of every layer it ever had."""
    before = len(STATES)
    module, _ = packed_and_twin("qwen3_moe")
    module(torch.randn(3, H), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert len(STATES) == before + 1
    del module
    assert len(STATES) == before
