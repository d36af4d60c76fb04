"""LoRA adapters in vLLM on models whose experts are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm_support import TOLERANCE, compare, needs_vllm, run_vllm

from bitsmoe_plugin import ConfigError

pytestmark = needs_vllm

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPTS = [[5, 6, 7, 11, 13, 60, 61, 62, 3, 9], [17, 30, 2]]
RANK, ALPHA = 4, 8


def write_adapter(directory: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A random adapter as PEFT stores it; returns what it adds to each weight, ``[out, in]``.

    Args:
        sizes: module -> (out, in).
    """
    generator = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for name, (rows, columns) in sizes.items():
        a, b = (0.3 * torch.randn(size, generator=generator) for size in ((RANK, columns), (rows, RANK)))
        tensors |= {f"base_model.model.{name}.lora_{k}.weight": t for k, t in (("A", a), ("B", b))}
        added[name] = ALPHA / RANK * b @ a
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    ends = sorted({name.rpartition(".")[2] for name in sizes})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ends, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return added


@pytest.fixture(scope="module")
def adapted(packed_moe_tiny: Path) -> Any:
    """The packed model in transformers."""
    return AutoModelForCausalLM.from_pretrained(packed_moe_tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def results(packed_moe_tiny: Path, adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """An engine without target modules, and one with; ``adapted`` gets the adapter into its weights."""
    folder = tmp_path_factory.mktemp("lora")
    modules = dict(adapted.named_modules())
    sizes = {n: tuple(m.weight.shape) for n, m in modules.items() if n.rpartition(".")[2] in LINEAR}
    experts = "model.layers.1.mlp.experts"
    each = {**sizes, f"{experts}.3.gate_proj": (64, 128), f"{experts}.3.down_proj": (128, 64)}
    fused = {**sizes, experts: (128, 64 * RANK), f"{experts}.base_layer": (128, 128 * RANK)}
    for name, added in write_adapter(folder / "attention", sizes).items():
        modules[name].weight.data += added
    for name, more in (("each", each), ("fused", fused)):
        write_adapter(folder / name, more)
    lora = {"enable_lora": True, "max_lora_rank": 8}
    job = {"model": str(packed_moe_tiny), "prompts": PROMPTS, "max_tokens": 24}
    return run_vllm(
        [
            {**job, "options": lora, "refused": True},
            {
                **job,
                "options": {**lora, "lora_target_modules": LINEAR},
                "adapter": str(folder / "attention"),
                "refused_adapters": [str(folder / name) for name in ("each", "fused")],
            },
        ],
        folder,
    )


def test_an_adapter_on_attention_answers_as_merged_weights_do(results, adapted) -> None:
    """Guards the use of LoRA at all: packed experts must not be wrapped, attention must be."""
    for plain, sequence in zip(results[1]["sequences"], results[1]["adapted"], strict=True):
        assert plain["tokens"] != sequence["tokens"]
        difference, behind = compare(adapted, sequence)
        assert difference < TOLERANCE
        assert behind < TOLERANCE


def test_target_modules_must_be_given(results) -> None:
    """By default vLLM wraps the experts too, and fails with "Unsupported base layer"."""
    message = results[0]["error"]
    assert "layers.0.mlp.experts" in message
    assert "--lora-target-modules with linear layers only: q_proj k_proj v_proj o_proj" in message


@pytest.mark.parametrize("adapter", [0, 1])
def test_adapters_for_experts_are_refused(results, adapter: int) -> None:
    """vLLM would apply the rest of the adapter, without a word; one tensor per expert, and one for all."""
    assert "has weights for experts (model.layers.1.mlp.experts" in results[1]["refusals"][adapter]


@pytest.mark.parametrize(
    "targets",
    [
        None,
        ["experts"],
        ["q_proj", "experts.3.gate_proj"],
        ["model.layers.1.mlp.experts"],
        ["routed_experts"],
    ],
)
def test_targets_that_name_experts_are_refused(targets: list[str] | None) -> None:
    from vllm.config import LoRAConfig

    from vllm_ext.lora import check_targets

    prefix = "model.layers.1.mlp.experts"
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts.*only: q_proj"):
        check_targets(LoRAConfig(target_modules=targets), prefix, ["q_proj"])
    check_targets(
        LoRAConfig(target_modules=["gate_up_proj", "down_proj", "shared_experts"]), prefix, ["q_proj"]
    )
    check_targets(None, prefix, ["q_proj"])


def test_adapters_have_their_own_names_of_linear_layers() -> None:
    """The message names what PEFT knows, not what vLLM makes of it."""
    from vllm_ext.lora import adapter_names

    made = ["model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate"]
    assert adapter_names(made, {"qkv_proj": LINEAR[:3]}) == LINEAR
