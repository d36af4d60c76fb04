"""Reload weights of one engine in several ways: ``python vllm_reload.py JOB.json RESULTS.json``.

A job is ``{"first", "second"}``, two packed checkpoints of one model, ``"damaged"``, the second with a wrong
bit, and ``"dense"``, an unquantized one. The result is, of every step, whose experts the engine computes
after it ("first", "second", "other", or the error of computing), and the error of the step. vLLM's own reload
on a CPU garbles text, of unquantized models as well, so experts are judged by parameters and outputs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from safetensors.torch import load_file
from vllm import LLM

from vllm_ext.moe_method import BitsMoEMethod


class Engine:
    """One engine, started with the first checkpoint."""

    def __init__(self, job: dict[str, str]) -> None:
        self.job = job
        self.llm = LLM(
            job["first"],
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            gpu_memory_utilization=0.1,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            distributed_executor_backend="uni",
        )
        self.model = self.llm.llm_engine.model_executor.driver_worker.get_model()
        modules = list(self.model.modules())
        self.layers = [m for m in modules if isinstance(getattr(m, "quant_method", None), BitsMoEMethod)]
        self.outputs: dict[str, list[torch.Tensor]] = {}

    def computed(self) -> list[torch.Tensor]:
        """Outputs of the experts of every layer, as vLLM would have them."""
        x = torch.randn(5, self.layers[0].hidden_size, generator=torch.Generator().manual_seed(3))
        ids, weights = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
        return [layer.quant_method.forward(x, weights, ids) for layer in self.layers]

    def whose(self) -> str:
        """The checkpoint whose tensors all layers hold, and compute as when they were first loaded."""
        try:
            found = self.computed()
        except ValueError as error:
            return str(error)
        for name in ("first", "second"):
            stored = {k: t for k, t in self.tensors(name) if ".bitsmoe_" in k}
            held = {
                f"model.layers.{number}.mlp.experts.{buffer}": parameter
                for number, layer in enumerate(self.layers)
                for buffer, parameter in layer.named_parameters()
            }
            if held.keys() == stored.keys() and all(torch.equal(held[k], t) for k, t in stored.items()):
                expected = self.outputs.setdefault(name, found)
                return name if all(map(torch.equal, found, expected)) else f"parameters of the {name}, other"
        return "other"

    def reload(self, **options: Any) -> None:
        """vLLM's own."""
        self.llm.collective_rpc("reload_weights", kwargs=options)

    def tensors(self, name: str) -> list[tuple[str, torch.Tensor]]:
        """All tensors of a checkpoint, as a trainer would hand them over."""
        return list(load_file(Path(self.job[name]) / "model.safetensors").items())

    def path(self, name: str) -> None:
        self.reload(weights_path=self.job[name])

    def stream(self, name: str) -> None:
        """Neither the directory that is served nor its manifest describe these."""
        self.reload(weights_iterator=iter(self.tensors(name)))

    def pieces(self, name: str) -> None:
        """Tensor by tensor, outside of a reload; on a CPU vLLM's own layers cannot take any."""
        for item in self.tensors(name):
            if ".bitsmoe_" in item[0]:
                self.model.load_weights([item])

    def forget(self) -> None:
        """What sleep of level 2 leaves behind, on a CPU done by hand."""
        for layer in self.layers:
            for parameter in layer.parameters():
                parameter.data.fill_(-1)

    def deep_sleep(self) -> None:
        self.forget()
        self.reload()

    def kernel_format(self, name: str) -> None:
        """Parameters by vLLM's names for them, in the sizes that they have."""
        self.forget()
        tensors = [
            (key.replace(".experts.", ".experts.routed_experts."), tensor)
            for key, tensor in self.tensors(name)
            if ".bitsmoe_" in key
        ]
        first = [item for item in tensors if not item[0].endswith("row_codes")]
        rest = [item for item in tensors if item[0].endswith("row_codes")]
        self.reload(weights_iterator=iter(rest + first), is_checkpoint_format=False)


STEPS: dict[str, Callable[[Engine], None]] = {
    "start first": lambda engine: None,
    "path second": lambda engine: engine.path("second"),
    "path first": lambda engine: engine.path("first"),
    "stream second": lambda engine: engine.stream("second"),
    "deep sleep first": lambda engine: engine.deep_sleep(),
    "kernel format first": lambda engine: engine.kernel_format("first"),
    "pieces second": lambda engine: engine.pieces("second"),
    "path other": lambda engine: engine.path("dense"),
    "after that first": lambda engine: engine.path("first"),
    "stream other": lambda engine: engine.stream("dense"),
}


def main() -> None:
    engine, results = Engine(json.loads(Path(sys.argv[1]).read_text())), {}
    for name, step in STEPS.items():
        error = ""
        try:
            step(engine)
        except Exception as caught:  # the test looks at all of them
            error = f"{type(caught).__name__}: {caught}"
        results[name] = [engine.whose(), error]
        print(name, *results[name], flush=True)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
