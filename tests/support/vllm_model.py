"""vLLM's own model around packed experts, without an engine: ``python vllm_model.py JOBS.json RESULTS.pt``.

Everything that vLLM does before its first attention: its configuration, its model, its loader, its router
and the layers of experts. Attention is what a build for GPUs has no code for on a CPU. Each job is a
directory; of its result see ``blocks``. The transformers side of a comparison runs elsewhere, because vLLM
changes classes of transformers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The platform of a build for GPUs where there is none; a build for CPUs takes no other.
os.environ["VLLM_TARGET_DEVICE"] = "cpu"

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.model_loader.weight_cache.protocol import check_ipc_quant_support

from vllm_ext import ops
from vllm_ext.moe_method import BitsMoEMethod

TOKENS = 21


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name of the block, the block, vLLM's experts in it) of every packed layer."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(getattr(module, "quant_method", None), BitsMoEMethod):
            block = name.removesuffix(".experts.routed_experts")
            yield block, modules[block], module


def inputs(hidden_size: int) -> Tensor:
    """``[TOKENS, hidden_size]``."""
    return torch.randn(TOKENS, hidden_size, generator=torch.Generator().manual_seed(5))


def check_operator(experts: Any, hidden_size: int) -> None:
    """Raises if the operator's fake says otherwise than it computes, also of tensors with other strides."""
    x = inputs(hidden_size)
    weights, ids = torch.full((TOKENS, 2), 0.5), torch.tensor([[0, 1]] * TOKENS, dtype=torch.int32)
    for strided in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, :hidden_size]):
        arguments = (strided, weights, ids, experts.layer_name)
        torch.library.opcheck(ops.routed_experts.default, arguments, test_utils=("test_schema",))
        torch.library.opcheck(ops.routed_experts.default, arguments, test_utils=("test_faketensor",))
        found = ops.routed_experts(*arguments)
        assert found.is_contiguous()
        assert torch.equal(found, ops.routed_experts(x, weights, ids, experts.layer_name))


def blocks(config: VllmConfig) -> dict[str, Any]:
    """Name of a block -> (its input, its output); and under "ipc" why vLLM's weight cache refuses the model.

    Each block is computed plainly, compiled, and after its weights were processed once more.
    """
    model = get_model(vllm_config=config)
    results: dict[str, Any] = {}
    for name, block, experts in experts_of(model):
        x = inputs(experts.moe_config.hidden_dim)
        with set_forward_context(None, config, num_tokens=TOKENS):
            found = block(x).clone()
            results[name] = (x, found)
            check_operator(experts, x.shape[1])
            assert torch.equal(torch.compile(block, backend="aot_eager")(x), found), name
            before = dict(experts.named_parameters())
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
            assert all(experts.get_parameter(key) is tensor for key, tensor in before.items())
            assert torch.equal(block(x), found), name
    config.compilation_config.static_forward_context.clear()  # names of layers, which may be there once
    with torch.device("meta"):
        empty = initialize_model(vllm_config=config)
    try:
        check_ipc_quant_support(empty)
    except Exception as error:
        results["ipc"] = str(error)
    return results


def main() -> None:
    torch.accelerator.empty_cache = lambda: None  # as vLLM's worker for CPUs has it
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        arguments = EngineArgs(
            model=job, dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                file = Path(sys.argv[2]).with_suffix(".store")
                init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            results.append(blocks(config))
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
