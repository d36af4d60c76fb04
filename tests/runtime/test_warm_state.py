"""Packed tensors that change after the first call: what kernels derived from them must not outlive them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_twin import E, H, packed_and_twin
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.runtime import dispatch, operator
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


def inputs(tokens: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :2]
    return torch.randn(tokens, H, generator=generator), index, torch.rand(tokens, 2, generator=generator)


def others(module: BitsMoEExperts) -> PackedExperts:
    """Other tensors of the same sizes: rows go to other experts, and all have other values."""
    packed = module.packed()
    return replace(
        packed,
        row_codes=packed.row_codes.roll(1, 1).contiguous(),
        payload=packed.payload.flip(0),
        input_scales=packed.input_scales.flip(0),
    )


def fresh(module: BitsMoEExperts, packed: PackedExperts) -> Tensor:
    """What a module that had these tensors from the start computes."""
    other = copy.deepcopy(module)
    other.load_packed(packed)
    return other(*inputs())


def load_state(assign: bool) -> Callable[[BitsMoEExperts, PackedExperts], None]:
    def change(module: BitsMoEExperts, packed: PackedExperts) -> None:
        module.load_state_dict({n: t.clone() for n, t in packed.tensors()}, assign=assign)

    return change


def copy_in_place(module: BitsMoEExperts, packed: PackedExperts) -> None:
    for name, tensor in packed.tensors():
        module.get_parameter(name).copy_(tensor)


def copy_data(module: BitsMoEExperts, packed: PackedExperts) -> None:
    for name, tensor in packed.tensors():
        module.get_parameter(name).data.copy_(tensor)


def set_data(module: BitsMoEExperts, packed: PackedExperts) -> None:
    for name, tensor in packed.tensors():
        module.get_parameter(name).data = tensor.clone()


def parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def set_attributes(module: BitsMoEExperts, packed: PackedExperts) -> None:
    for name, tensor in packed.tensors():
        setattr(module, name, parameter(tensor))


def copy_in_inference_mode(module: BitsMoEExperts, packed: PackedExperts) -> None:
    with torch.inference_mode():
        copy_in_place(module, packed)


def load_in_inference_mode(module: BitsMoEExperts, packed: PackedExperts) -> None:
    with torch.inference_mode():
        load_state(assign=True)(module, packed)


CHANGES = {
    "load_state_dict": load_state(assign=False),
    "load_state_dict(assign=True)": load_state(assign=True),
    "copy_": copy_in_place,
    "data.copy_": copy_data,
    "data =": set_data,
    "setattr": set_attributes,
    "copy_ in inference mode": copy_in_inference_mode,
    "load_state_dict in inference mode": load_in_inference_mode,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("options", [{}, {"grid": "tiled", "basis_bits": 16, "kept": (1,)}], ids=str)
def test_new_tensors_are_computed_with(change, options: dict[str, Any]) -> None:
    """Guards against offsets of the former tensors, in the forward and in the backward pass."""
    module, _ = packed_and_twin("qwen3_moe", **{"kept": (), **options})
    if module.spec.kept:  # rows may not go to the kept expert
        packed = replace(module.packed(), payload=module.packed().payload.flip(0))
    else:
        packed = others(module)
    before, wanted = module(*inputs()), fresh(module, packed)
    change(module, packed)
    found = module(*inputs())
    assert not torch.allclose(before, wanted)
    assert torch.equal(found, wanted)
    hidden, index, weights = inputs()
    asking = hidden.requires_grad_()
    module(asking, index, weights).sum().backward()
    expected = copy.deepcopy(module)
    expected.load_packed(packed)
    again = inputs()[0].requires_grad_()
    expected(again, index, weights).sum().backward()
    assert torch.equal(asking.grad, again.grad)


def test_what_is_derived_is_derived_once(monkeypatch) -> None:
    """Guards the speed of a call, whatever its mode, and a copy's own state."""
    module, _ = packed_and_twin("qwen3_moe")
    calls, prepare = [], dispatch.prepare
    monkeypatch.setattr(dispatch, "prepare", lambda *args: calls.append(1) or prepare(*args))
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            for tokens in (1, 5, 33):
                module(*inputs(tokens))
    functional = dict(module.named_parameters())
    torch.func.functional_call(module, functional, inputs())
    hidden, index, weights = inputs()
    module(hidden.requires_grad_(), index, weights).sum().backward()
    assert len(calls) == 1
    copy.deepcopy(module)(*inputs())
    assert len(calls) == 2


def test_tensors_made_in_inference_mode_are_replaced() -> None:
    """They count no versions, so what happens to them cannot be noticed, and none has a backward pass."""
    module, _ = packed_and_twin("qwen3_moe")
    with torch.inference_mode():
        module.load_packed(PackedExperts(**{n[8:]: t.clone() for n, t in module.packed().tensors()}))
        assert not any(tensor.is_inference() for tensor in module.parameters())
        module._apply(torch.clone)  # as a move to a device does
    assert not any(tensor.is_inference() for tensor in module.parameters())
    wanted = module(*inputs())
    with torch.inference_mode():
        module.bitsmoe_payload = parameter(module.bitsmoe_payload.clone())
        assert torch.equal(module(*inputs()), wanted)
        module.bitsmoe_payload.zero_()
        assert not torch.allclose(module(*inputs()), wanted)


def test_copies_and_moves_compute_the_same() -> None:
    """Guards deepcopy, pickle, torch.save, shared memory and other tensors of functional_call, all warm."""
    module, _ = packed_and_twin("gpt_oss", kept=(2,))
    wanted = module(*inputs())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    assert all(torch.equal(other(*inputs()), wanted) for other in copies)
    copies[0].bitsmoe_payload.zero_()  # it is its own
    assert torch.equal(module(*inputs()), wanted)
    given = {name: tensor.clone() for name, tensor in module.named_parameters()}
    assert torch.equal(torch.func.functional_call(copies[0], given, inputs()), wanted)
    module.share_memory()  # moves what the kernels point at, in place
    assert torch.equal(module(*inputs()), wanted)


def test_a_state_that_is_packed_otherwise_is_refused() -> None:
    """Guards against tensors of the same shapes whose numbers stand for something else."""
    module, _ = packed_and_twin("qwen3_moe", widths=(0, 4), kept=(1,))
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"experts": module}).state_dict(), file)
    alike, *others = [
        packed_and_twin("qwen3_moe", **{"widths": (0, 4), "kept": (1,), **options})[0]
        for options in ({}, {"grid": "uniform"}, {"kept": (2,)}, {"original_dtype": "float16"})
    ]
    for other in others:
        file.seek(0)
        before = other(*inputs())
        with pytest.raises(
            CheckpointError, match="experts cannot be loaded: the tensors are packed with grid"
        ):
            nn.ModuleDict({"experts": other}).load_state_dict(torch.load(file))
        assert torch.equal(other(*inputs()), before)
    file.seek(0)
    alike.bitsmoe_payload.zero_()
    nn.ModuleDict({"experts": alike}).load_state_dict(torch.load(file))
    assert torch.equal(alike(*inputs()), module(*inputs()))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_leave_packed_tensors_alone(cast: str) -> None:
    """float16 scales and bfloat16 experts are stored as integers, so that no cast changes their bits."""
    module, _ = packed_and_twin("gpt_oss", kept=(2,))
    wanted, before = module(*inputs()), {n: b.clone() for n, b in module.named_parameters()}
    getattr(module, cast)()
    assert all(torch.equal(b, before[n]) and b.dtype == before[n].dtype for n, b in module.named_parameters())
    assert torch.equal(module(*inputs()), wanted)


def wrong(change: str) -> Callable[[BitsMoEExperts], None]:
    def apply(module: BitsMoEExperts) -> None:
        payload, codes = module.bitsmoe_payload, module.bitsmoe_row_codes
        changes: dict[str, Callable[[], Any]] = {
            "row codes": lambda: codes.fill_(255),
            "row codes, past the version counter": lambda: codes.data.fill_(255),
            "scale grid": lambda: module.bitsmoe_scale_grid.fill_(0x7C00),
            "short payload": lambda: setattr(module, "bitsmoe_payload", parameter(payload[:-1].clone())),
            "dtype": lambda: setattr(module, "bitsmoe_payload", parameter(payload.long())),
            "shape": lambda: setattr(module, "bitsmoe_row_codes", parameter(codes[:, :-1].clone())),
            "freed memory": lambda: payload.untyped_storage().resize_(0),
            "meta": lambda: setattr(module, "bitsmoe_payload", parameter(payload.to("meta"))),
        }
        changes[change]()

    return apply


@pytest.mark.parametrize(
    "change",
    [
        "row codes",
        "row codes, past the version counter",
        "scale grid",
        "short payload",
        "dtype",
        "shape",
        "freed memory",
        "meta",
    ],
)
def test_tensors_that_do_not_fit_never_reach_a_kernel(change: str) -> None:
    """Guards memory: kernels find rows by offsets that follow from the row codes."""
    module, _ = packed_and_twin("qwen3_moe", seed=2)
    module(*inputs())
    wrong(change)(module)
    with pytest.raises(CheckpointError):
        module(*inputs())
    with pytest.raises(CheckpointError):
        module(inputs()[0].requires_grad_(), *inputs()[1:])


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_that_does_not_fit_is_refused_by_name(assign: bool) -> None:
    """Guards the layer's tensors: they are as before, and the error says which layer it is."""
    model = torch.nn.ModuleDict({"mlp": packed_and_twin("qwen3_moe")[0]})
    wanted, state = model["mlp"](*inputs()), model.state_dict()
    bad = {
        "mlp.bitsmoe_row_codes": torch.full_like(state["mlp.bitsmoe_row_codes"], 255),
        "mlp.bitsmoe_payload": state["mlp.bitsmoe_payload"].float(),
        "mlp.gate_up_proj": torch.zeros(E, 8, H),
    }
    for name, tensor in bad.items():
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=r"^mlp[.:]"):
                model.load_state_dict({**state, name: tensor}, strict=strict, assign=assign)
    assert torch.equal(model["mlp"](*inputs()), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, i, w: (x[:, :-1], i, w),
            r"hidden states are \[33, 63\], packed experts take \[tokens, 64\]",
        ),
        (lambda x, i, w: (x, i[:5], w[:5]), r"top_k_index is \[5, 2\], top_k_weights \[5, 2\] for 33 tokens"),
        (lambda x, i, w: (x, i, w[:, :1]), r"top_k_weights \[33, 1\]"),
        (lambda x, i, w: (x[None], i, w), r"hidden states are \[1, 33, 64\]"),
    ],
)
def test_calls_that_do_not_fit_never_reach_a_kernel(change, message: str) -> None:
    """Guards memory: an exported graph can be called with anything."""
    module, _ = packed_and_twin("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        module(*change(*inputs()))


def test_a_graph_whose_text_was_altered_is_refused() -> None:
    """The sizes of a layer are text in an exported graph; kernels must not believe just any."""
    module, _ = packed_and_twin("qwen3_moe")
    for before, after in [
        ('"num_experts":5', '"num_experts":500'),
        ('"hidden_size":64', '"hidden_size":-64'),
        ('"widths":[0,', '"widths":[0,5,'),
        ('"gating":"silu"', '"gating":["silu"]'),
        ('"kept":[]', '"kept":[9]'),
        ('{"spec"', '["spec"'),
    ]:
        assert before in module._kind
        with pytest.raises((CheckpointError, ValueError)):
            operator.packed_experts(*inputs(), module._tensors(), module._kind.replace(before, after))
    with pytest.raises(CheckpointError, match="6 packed tensors are given, the layer has 7"):
        operator.packed_experts(*inputs(), module._tensors()[:-1], module._kind)


def test_saved_after_a_change_it_loads(packed_moe_tiny, tmp_path) -> None:
    """Guards the hashes in config.json: they are those of the tensors that are saved."""
    ids = torch.arange(5, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype=torch.float32)
    with torch.no_grad():
        before = model(ids).logits
        for name, buffer in model.named_parameters():
            if name.endswith("output_scales"):
                buffer.view(torch.float16).mul_(0.5)
        changed = model(ids).logits
        model.save_pretrained(tmp_path / "changed")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "changed", dtype=torch.float32)
        assert not torch.allclose(before, changed)
        assert torch.equal(loaded(ids).logits, changed)
        next(b for n, b in model.named_parameters() if n.endswith("row_codes")).fill_(255)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts: row codes describe"):
        model.save_pretrained(tmp_path / "broken")


def test_loaded_and_used_in_any_process_wide_state(packed_moe_tiny) -> None:
    """Guards inference mode, default dtypes and deterministic algorithms: the result is the same."""
    ids = torch.arange(5, 60)[None]

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype=torch.float32).eval()

    with torch.no_grad():
        wanted = load()(ids).logits
    with torch.inference_mode():
        model = load()
        assert torch.equal(model(ids).logits, wanted)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    model, reference = load(), load()
    reference(ids, labels=ids).loss.backward()
    torch.set_default_dtype(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        other = load()
        assert torch.equal(other(ids).logits, wanted)
        for each in (model, other):
            each(ids, labels=ids).loss.backward()
            for found, right in zip(each.parameters(), reference.parameters(), strict=True):
                assert right.grad is None if found.grad is None else torch.equal(found.grad, right.grad)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    with torch.device("meta"):  # stands for any default device but the model's
        hidden = torch.zeros(20, 128, device="cpu")
        index, weights = torch.zeros(20, 1, dtype=torch.long, device="cpu"), torch.ones(20, 1, device="cpu")
        layer = next(m for m in model.modules() if isinstance(m, BitsMoEExperts))
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(hidden, index, weights), hidden)
        copied(hidden.requires_grad_(), index, weights).sum().backward()
