"""Packed experts under torch.compile, torch.export and torch.jit.trace."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from dense_twin import E, H, originals, packed_and_twin, small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig

from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.runtime import layer_kind
from bitsmoe_plugin.runtime.layer_kind import gating_name, gating_of

IDS = torch.arange(5, 60)[None]
OTHERS = torch.arange(63, 20, -1)[None]


class Block(nn.Module):
    """A router and packed experts."""

    def __init__(self, family: str = "qwen3_moe", **options: Any) -> None:
        super().__init__()
        self.experts, _ = packed_and_twin(family, **options)
        self.gate = nn.Linear(H, E)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, index, weights)


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model() -> Any:
    """Packed, of one layer."""
    return small_model()


def test_a_compiled_model_computes_the_same() -> None:
    """Whole graph, before and after eager calls, as lengths change: guards against values of memory that
    was never written, and against breaks in the graph."""
    warm = small_model()
    cold = copy.deepcopy(warm)
    with torch.no_grad():
        wanted = [warm(ids).logits for ids in (IDS, OTHERS)]
        for each in (cold, warm):
            compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
            for _ in range(2):
                assert torch.equal(compiled(IDS).logits, wanted[0])
                assert torch.equal(compiled(OTHERS).logits, wanted[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_inductor_and_a_change_of_weights(family: str) -> None:
    """The default backend, forward and backward; a compiled layer computes with tensors that came later."""
    block = Block(family)
    compiled = torch.compile(block, fullgraph=True)
    for change in (False, True):
        if change:
            block.experts.bitsmoe_payload.copy_(block.experts.bitsmoe_payload.flip(0))
        x, y = (torch.randn(9, H, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        out, wanted = compiled(x.requires_grad_()), block(y.requires_grad_())
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-4)
        out.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)


def test_one_graph_for_all_lengths() -> None:
    """Guards the fake operator: nothing of it may fix the number of tokens."""
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(9, H))
        with torch.compiler.set_stance("fail_on_recompile"):
            for tokens in (2, 17, 300):
                x = torch.randn(tokens, H)
                assert torch.equal(compiled(x), block(x))


def test_copies_per_expert_compile() -> None:
    """Guards Llama4, where how many rows there are depends on the data."""
    experts, _ = packed_and_twin("llama4_text")
    copies = torch.randn(E * 7, H) * (torch.rand(E * 7, 1) > 0.7)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(copies), experts(copies))


def test_generation_with_a_static_cache_compiles(packed_moe_tiny) -> None:
    """transformers compiles by itself what its quantizer calls compileable."""
    model = AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype=torch.float32).eval()
    options = CompileConfig(fullgraph=True, backend="eager", mode=None)
    options._compile_all_devices = True
    settings = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(IDS[:, :8], **settings)
    torch._dynamo.utils.counters.clear()
    found = model.generate(IDS[:, :8], cache_implementation="static", compile_config=options, **settings)
    assert found.tolist() == wanted.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def exported(model: Any) -> Any:
    tokens = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=512)}, "use_cache": None}
    inputs = {"input_ids": IDS, "use_cache": False}
    return torch.export.export(model, (), inputs, dynamic_shapes=tokens)


def test_an_exported_model_runs_here_and_elsewhere(model, tmp_path) -> None:
    """The program holds the packed tensors; another process needs nothing but an import of ours."""
    with torch.no_grad():
        program, wanted = exported(model), model(OTHERS).logits
        assert torch.equal(program.module()(input_ids=OTHERS, use_cache=False).logits, wanted)
    assert any(name.endswith("bitsmoe_payload") for name in program.state_dict)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((OTHERS, wanted), tmp_path / "wanted.pt")
    script = (
        "import sys, torch, bitsmoe_plugin.runtime.operator\n"
        "import transformers.cache_utils, transformers.modeling_outputs\n"
        "ids, wanted = torch.load(sys.argv[2])\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "assert torch.equal(program(input_ids=ids, use_cache=False)['logits'], wanted)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt2"), str(tmp_path / "wanted.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Logits(nn.Module):
    """A model that returns a tensor, as torch.jit wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def test_a_traced_model_computes_the_same(model) -> None:
    """Guards torch.jit.trace: nothing of the experts may be a constant of the tokens it was traced with."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' masks, and that torch.jit is old
        traced = torch.jit.trace(Logits(model), IDS)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for ids in (IDS, IDS.flip(1)):
            for program in (traced, loaded):
                assert torch.equal(program(ids), model(ids).logits)


def test_gatings_without_a_name_stay_in_their_process(monkeypatch) -> None:
    """GPT-OSS' gating has a name that only this process knows: guards against another's under that name."""
    monkeypatch.setattr(layer_kind, "_OWN", [])
    first, second = (originals()["gpt_oss"] for _ in range(2))
    name = gating_name(first)
    assert gating_name(second) == name  # one for all layers
    second.limit = 3.0
    assert gating_name(second) != name
    gate, up = torch.randn(2, 5, 8) * 5
    assert torch.equal(
        gating_of(gating_name(second))(gate, up), second._apply_gate(torch.stack([gate, up], -1).flatten(-2))
    )
    assert gating_name(originals()["qwen3_moe"]) == "silu"
    for unknown in ("GptOssExperts#7", "Other#0", "GptOssExperts#x"):
        with pytest.raises(ConfigError, match="whose gating only the process that made the graph knows"):
            gating_of(unknown)


def test_clamped_gatings_are_not_taken_for_others() -> None:
    """Families clamp far out, at 7 or 10: guards against silu in their place on a GPU or in a graph."""
    module = originals()["qwen3_moe"]
    module._apply_gate = lambda both: (
        nn.functional.silu(both.chunk(2, -1)[0].clamp(max=10)) * both.chunk(2, -1)[1]
    )
    assert gating_name(module).startswith("Qwen3MoeExperts#")
