"""What the vLLM tests share: packed models, runs of vLLM, and the transformers runtime to compare with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.checkpoint.manifest import layer_manifest
from bitsmoe_plugin.codec.basis import quantize_basis
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts, index_rows, pack_basis
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run make install-vllm test-vllm"
)
TOLERANCE = 1e-4
"""In log-probabilities, between vLLM and transformers in float32, where no router has a near tie. Both run
the same kernels, but add up in another order what goes into them. Measured on 17,741 tokens of the bundled
model: up to 1.1e-5, as unquantized; with inputs rounded to 16 bits 3e-4, and 2e-2 where a tie tips over."""
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "max_position_embeddings": 256,
    # Five times the usual: the experts of so small a model would else add next to nothing.
    "initializer_range": 0.1,
    # Sizes that vLLM's attention kernels for the CPU know.
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


# As in every published DeepSeek. Without scaling, vLLM 0.32 on a CPU rotates DeepSeek's interleaved positions
# otherwise than transformers does, in unquantized models too.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
# The last two: vLLM reads them, transformers' class does not know them.
DEEPSEEK_V3 = {
    "head_dim": 64,  # that of the rotated part
    "n_group": 2,
    "rope_parameters": YARN,
    "routed_scaling_factor": 2.5,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}


def small_model(model_type: str, **changes: Any) -> Any:
    """A random causal language model of a family, in sizes that vLLM serves on a CPU."""
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SMALL.items() if hasattr(known, name)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name and name.endswith("_bias"):  # made as zeros
            parameter.data.normal_(std=0.1)
    return model


def pack_small(model: Any, directory: Path, extra: dict[str, Tensor] | None = None) -> Path:
    """Quantize a small model to 4 bits and save it; returns where.

    Args:
        extra: tensors of the checkpoint that transformers has no module for.
    """
    model.save_pretrained(directory / "dense")
    if extra:
        file = directory / "dense" / "model.safetensors"
        save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    tokens = torch.randint(2, 96, (16, 32), generator=torch.Generator().manual_seed(1))
    config = BitsMoEConfig(bits=4, dataset=tokens.tolist(), sequence_length=32)
    packed = AutoModelForCausalLM.from_pretrained(directory / "dense", quantization_config=config)
    packed.save_pretrained(directory / "packed")
    return directory / "packed"


def run_vllm(jobs: list[dict[str, Any]], folder: Path, python_path: str = "") -> list[dict[str, Any]]:
    """Run ``vllm_generate.py``.

    Args:
        python_path: folders to find more packages in, before those of PYTHONPATH.

    Raises:
        RuntimeError: with what vLLM wrote.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_generate.py")
    command = [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "results.json")]
    path = os.pathsep.join(filter(None, (python_path, ENVIRONMENT.get("PYTHONPATH", ""))))
    environment = {**ENVIRONMENT, "PYTHONPATH": path} if path else ENVIRONMENT
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if run.returncode:
        raise RuntimeError(run.stdout[-4000:] + run.stderr[-8000:])
    return json.loads((folder / "results.json").read_text())


@torch.no_grad()
def log_probabilities(model: Any, tokens: list[int]) -> Tensor:
    """``[n, vocabulary]`` float32 of the token after each."""
    return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def compare(model: Any, sequence: dict[str, Any]) -> tuple[float, float]:
    """The largest of each of ``differences``."""
    off, behind = differences(model, sequence)
    return float(off.max()), float(behind.max())


def differences(model: Any, sequence: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Judge what vLLM generated by the transformers runtime, given the same tokens so far.

    Returns:
        difference of the log-probability of each token; and by how much each token that vLLM chose is
        less likely than the best one.
    """
    tokens = sequence["prompt"] + sequence["tokens"]
    found = torch.tensor(sequence["prompt_logprobs"] + sequence["logprobs"])
    expected = log_probabilities(model, tokens)[:-1][-len(found) :]
    chosen = expected.gather(1, torch.tensor(tokens[-len(found) :])[:, None])[:, 0]
    behind = (expected.max(-1).values - chosen)[-len(sequence["tokens"]) :]
    return (chosen - found).abs(), behind


def random_packed(shape: LayerShape, config: BitsMoEConfig, seed: int) -> PackedExperts:
    """A packed layer of random words; every row takes a random width."""
    g = torch.Generator().manual_seed(seed)
    e, r = shape.num_experts, shape.rank
    codes = torch.randint(len(config.widths) * SCALE_LEVELS, (3, e, r), generator=g).to(torch.uint8)
    words = index_rows(codes, config.widths, shape).words
    payload = torch.randint(-(2**31), 2**31, (words,), generator=g).to(torch.int32)
    grid = torch.full((3, 2, r), -8.0).half()
    grid[:, 1] = 0.0
    bases = [
        pack_basis(quantize_basis(torch.randn(rows, r, generator=g) / r**0.5, config.basis_bits, 32))
        for rows in (config.input_bases * r, r)
    ]
    return PackedExperts(codes, grid.view(torch.int16), payload, *bases[0], *bases[1])


def write_random_packed(directory: Path, shape: LayerShape, layers: int, seed: int = 0) -> BitsMoEConfig:
    """A packed Qwen3-MoE checkpoint of random rows, without quantizing."""
    config = BitsMoEConfig(widths=(0, 1, 2, 3, 4))
    changes = {"num_hidden_layers": layers, "hidden_size": shape.hidden_size}
    model = small_model("qwen3_moe", num_experts=1, num_experts_per_tok=1, **changes)
    model.config.num_experts = model.config.num_local_experts = shape.num_experts
    model.config.moe_intermediate_size = shape.intermediate_size
    model.save_pretrained(directory)
    tensors = {k: t for k, t in load_file(directory / "model.safetensors").items() if ".experts." not in k}
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp.experts"
        packed = random_packed(shape, config, seed + layer)
        tensors.update({f"{name}.{buffer}": tensor for buffer, tensor in packed.tensors()})
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(shape.num_experts, shape.hidden_size)
        config.layers[name] = layer_manifest(shape, packed, torch.float32)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    entries = json.loads((directory / "config.json").read_text())
    entries["quantization_config"] = config.to_dict()
    (directory / "config.json").write_text(json.dumps(entries))
    return config
