"""Fixtures shared by the tests: a small MoE layer with structure, and the bundled trained model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Triton decides when it is imported, and torch imports it, whether its functions are compiled or interpreted.
# TRITON_INTERPRET=0 pytest tests/*/test_gpu_*.py runs what needs a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# As in this process, see below: results depend on the number of threads, and several tests run at once.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from shared_directories import made_once
from torch import Tensor, nn
from wheel_support import install_wheel

from bitsmoe_plugin.base import linalg
from bitsmoe_plugin.calibration.activations import LayerActivations
from bitsmoe_plugin.models.expert_weights import ExpertWeights

pytest_plugins = ["untrusted_cases"]

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)


def silu_gating(gate: Tensor, up: Tensor) -> Tensor:
    """Gating of most MoE families."""
    return nn.functional.silu(gate) * up


@dataclass(frozen=True)
class Layer:
    """A small MoE layer with its calibration."""

    weights: ExpertWeights
    activations: LayerActivations
    gating: Callable[[Tensor, Tensor], Tensor] = silu_gating

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Reference: token by token in float64, ``[T, H]``."""
        gate, up, down = (w.double() for w in vars(self.weights).values())
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for t, slot in torch.cartesian_prod(*(torch.arange(n) for n in top_k_index.shape)).tolist():
            e, x = int(top_k_index[t, slot]), hidden[t].double()
            if e < len(gate):
                out[t] += top_k_weights[t, slot].double() * (down[e] @ self.gating(gate[e] @ x, up[e] @ x))
        return out


def build_layer(experts: int, size: int, hidden: int, tokens: int, k: int = 2, seed: int = 0) -> Layer:
    """Weights that share directions of falling strength and inputs that are correlated."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    strength = torch.logspace(0, -1, hidden)
    read = torch.linalg.qr(normal(hidden, hidden))[0] * strength
    write = torch.linalg.qr(normal(hidden, hidden))[0] * strength
    weights = ExpertWeights(
        gate=normal(experts, size, hidden) @ read.T / hidden**0.5,
        up=normal(experts, size, hidden) @ read.T / hidden**0.5,
        down=write @ normal(experts, hidden, size) / size**0.5,
    )
    x = (
        normal(tokens, hidden)
        @ torch.linalg.qr(normal(hidden, hidden))[0]
        * torch.logspace(0.5, -0.5, hidden)
    )
    score, index = normal(tokens, experts).softmax(-1).topk(k)
    omega = torch.rand(tokens, generator=g) + 0.5
    return Layer(weights, LayerActivations(x, index, score / score.sum(-1, keepdim=True), omega))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A failure can be repeated by running its test alone."""
    torch.manual_seed(0)


@pytest.fixture
def float_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32, for what is compared with float64 to more digits than 16-bit integers have."""
    monkeypatch.setattr(linalg, "available", lambda device: False)


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    """``build_layer(experts, size, hidden, tokens, k=2, seed=0)``."""
    return build_layer


@pytest.fixture(scope="session")
def moe_tiny_path() -> Path:
    """The trained model bundled with the repository."""
    return Path(__file__).parents[1] / "examples" / "moe-tiny"


@pytest.fixture(scope="session")
def moe_tiny(moe_tiny_path: Path) -> Any:
    """The bundled model in float32. Shared by all tests: do not change it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(moe_tiny_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def small_moe_tiny(moe_tiny: Any, moe_tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the bundled model's layers with 8 of their experts: quantized within a second or two."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(moe_tiny_path, num_hidden_layers=2, num_experts=8)
    model, path = AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp("small") / "model"
    known = moe_tiny.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(known[name][tuple(slice(size) for size in tensor.shape)])
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(moe_tiny_path).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def packed_moe_tiny(moe_tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 2 bits, with its tokenizer; by the quickest options, for tests of runtimes."""
    from bitsmoe_plugin import BitsMoEConfig
    from bitsmoe_plugin.integrations.transformers import quantize_to_directory

    text = moe_tiny_path.parent / "data" / "calibration.jsonl"
    options = {"method": "paper-v2", "grid": "trellis", "basis_bits": 4, "joint_basis": True}
    config = BitsMoEConfig(
        bits=2.0, dataset=str(text), calibration_tokens=1024, sequence_length=256, **options
    )

    def quantize(directory: Path) -> None:
        quantize_to_directory(str(moe_tiny_path), directory / "model", config)

    return made_once(tmp_path_factory, "packed-moe-tiny", quantize) / "model"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a running vLLM may be told to reload, see ``reload_support.write_checkpoints``."""
    from reload_support import write_checkpoints

    return write_checkpoints(tmp_path_factory.mktemp("reload"))


@pytest.fixture(scope="session")
def installed_wheel(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as users get it: built into a wheel, from a source distribution, and installed into this
    directory, to be put on PYTHONPATH. The editable installation that tests run from has other entry points
    and files. Both distributions lie next to the directory, and ``source``, what they were built from."""
    root, cache = Path(__file__).parents[1], getattr(pytestconfig, "cache", None)  # -p no:cacheprovider
    kept = tmp_path_factory.mktemp("wheels") if cache is None else cache.mkdir("wheels")
    install = partial(install_wheel, root, kept)
    return made_once(tmp_path_factory, "wheel", install) / "installed"


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Model type -> random causal language model of that family, a few thousand weights."""

    def build(model_type: str, **changes: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 16,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_local_experts": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "pad_token_id": 0,
        }
        config = AutoConfig.for_model(model_type)
        for name, value in {**sizes, **changes}.items():
            if hasattr(config, name):
                setattr(config, name, value)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return build
