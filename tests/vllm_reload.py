"""Reload weights of one engine in many ways, in a process of its own: ``python vllm_reload.py JOB.json RESULTS.json``.

A job is ``{"first", "second"}``, two packed checkpoints of one model, ``"damaged"``, the second with a wrong
bit, and ``"dense"``, an unquantized one. The result of a step says whose experts the engine computes then
("first", "second", "other"; or the error of the first request), and the error of the step. vLLM's own reload
on a CPU garbles text, of unquantized models as well, so experts are judged by parameters and outputs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

from bitsmoe_plugin import BitsMoEConfig, kernels
from bitsmoe_plugin.packed_files import PackedFiles
from bitsmoe_plugin.serving import gating
from bitsmoe_plugin.sharding import whole
from vllm_ext.moe_method import BitsMoEMethod
from vllm_ext.weight_loading import load_shard

ACTIVATION = "silu"


class Engine:
    """One engine and what its experts should be."""

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
        self.layers = [
            module
            for module in self.model.modules()
            if isinstance(getattr(module, "quant_method", None), BitsMoEMethod)
        ]
        torch.manual_seed(0)
        self.expected = {name: [*map(self._outputs, self._stored(job[name]))] for name in ("first", "second")}

    @staticmethod
    def _stored(directory: str) -> list[tuple[Any, dict[str, torch.Tensor]]]:
        entries = json.loads((Path(directory) / "config.json").read_text())["quantization_config"]
        files = PackedFiles.open([Path(directory) / "model.safetensors"], BitsMoEConfig.from_dict(entries))
        return [load_shard(files, name, whole(s.shape), torch.device("cpu")) for name, s in files.specs.items()]

    @staticmethod
    def _inputs(hidden: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(5, hidden, generator=generator)
        return x, torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)

    def _outputs(self, stored: tuple[Any, dict[str, torch.Tensor]]) -> torch.Tensor:
        spec, tensors = stored
        packed = kernels.PackedExperts(**{b.removeprefix("bitsmoe_"): t for b, t in tensors.items()})
        return kernels.prepare(spec, packed, gating(ACTIVATION)).forward(*self._inputs(spec.shape.hidden_size))

    def computed(self) -> list[torch.Tensor]:
        """Outputs of the experts of every layer, as vLLM would have them."""
        found = []
        for layer in self.layers:
            x, ids, weights = self._inputs(layer.hidden_size)
            found.append(layer.quant_method.forward(x, weights, ids))
        return found

    def whose(self) -> str:
        """The checkpoint that all layers compute, and that their parameters are of."""
        try:
            found = self.computed()
        except ValueError as error:
            return str(error)
        for name, expected in self.expected.items():
            if all(map(torch.equal, found, expected)):
                stored = self._stored(self.job[name])
                same = [
                    layer.get_parameter(buffer).equal(tensor)
                    for layer, (_, tensors) in zip(self.layers, stored, strict=True)
                    for buffer, tensor in tensors.items()
                ]
                return name if all(same) else f"{name}, with other parameters"
        return "other"

    def reload(self, **options: Any) -> None:
        """vLLM's own."""
        self.llm.collective_rpc("reload_weights", kwargs=options)

    def tensors(self, name: str) -> list[tuple[str, torch.Tensor]]:
        """All tensors of a checkpoint, as a trainer would hand them over."""
        return list(load_file(Path(self.job[name]) / "model.safetensors").items())


def _kernel_name(engine: Engine, buffer: str) -> str:
    return next(name for name, _ in engine.model.named_parameters() if name.endswith(buffer))


def from_path(engine: Engine) -> None:
    engine.reload(weights_path=engine.job["second"])


def back(engine: Engine) -> None:
    engine.reload(weights_path=engine.job["first"])


def from_iterator(engine: Engine) -> None:
    """Neither the directory that is served nor its manifest describe these."""
    engine.reload(weights_iterator=iter(engine.tensors("second")))


def after_deep_sleep(engine: Engine) -> None:
    """What level 2 leaves behind, on a CPU done by hand: parameters without values."""
    for layer in engine.layers:
        for parameter in layer.parameters():
            parameter.data.fill_(-1)
    engine.reload()


def in_pieces(engine: Engine) -> None:
    """How trainers write into a running model; experts may only change when all is there."""
    *most, last = [item for item in engine.tensors("second") if ".bitsmoe_" in item[0]]
    for name, tensor in most:
        sent = tensor.clone()
        engine.model.load_weights([(name, sent)])
        sent.fill_(0)  # its memory is the next tensor's
    mixed = engine.layers[-1 if "layers.1." in last[0] else 0].quant_method
    x, ids, weights = engine._inputs(128 if False else engine.layers[0].hidden_size)
    index = [layer.quant_method for layer in engine.layers].index(mixed)
    assert torch.equal(mixed.forward(x, weights, ids), engine.expected["first"][index])
    engine.model.load_weights([last])


def kernel_format(engine: Engine) -> None:
    """Scales times zero: outputs are zero."""
    name = _kernel_name(engine, "bitsmoe_output_scales")
    values = torch.zeros_like(engine.model.get_parameter(name))
    engine.reload(weights_iterator=iter([(name, values)]), is_checkpoint_format=False)
    assert not bool(engine.computed()[0].any())


def kernel_format_of_other_size(engine: Engine) -> None:
    name = _kernel_name(engine, "bitsmoe_payload")
    engine.reload(weights_iterator=iter([(name, torch.zeros(1, dtype=torch.int32))]), is_checkpoint_format=False)


def written_row_codes(engine: Engine) -> None:
    """Other offsets, and so words, than the payload has."""
    engine.layers[0].bitsmoe_row_codes.fill_(7 << 5)


def incomplete_iterator(engine: Engine) -> None:
    engine.reload(weights_iterator=(item for item in engine.tensors("second") if "row_codes" not in item[0]))


def altered_iterator(engine: Engine) -> None:
    def altered():
        for name, tensor in engine.tensors("second"):
            yield name, tensor[:-32] if name.endswith("payload") else tensor

    engine.reload(weights_iterator=altered())


def damaged_path(engine: Engine) -> None:
    engine.reload(weights_path=engine.job["damaged"])


def dense_path(engine: Engine) -> None:
    engine.reload(weights_path=engine.job["dense"])


def dense_iterator(engine: Engine) -> None:
    engine.reload(weights_iterator=iter(engine.tensors("dense")))


def without_experts(engine: Engine) -> None:
    engine.reload(weights_iterator=(item for item in engine.tensors("second") if ".bitsmoe_" not in item[0]))


def overwritten(engine: Engine) -> None:
    """A trainer saves into the directory that is served."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(engine.job["second"]) / name, Path(engine.job["served"]) / f"{name}.new")
        (Path(engine.job["served"]) / f"{name}.new").rename(Path(engine.job["served"]) / name)
    engine.reload()


def generated(engine: Engine) -> None:
    engine.llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=1, detokenize=False))


def serve_copy(engine: Engine) -> None:
    shutil.copytree(engine.job["first"], engine.job["served"])
    engine.reload(weights_path=engine.job["served"])


STEPS: list[Callable[[Engine], None]] = [
    from_path, back, from_iterator, after_deep_sleep, in_pieces, back, kernel_format, back,
    kernel_format_of_other_size, written_row_codes, back, without_experts, serve_copy, overwritten,
    dense_path, generated, back, damaged_path, generated, back,
]  # fmt: skip


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = Engine(job)
    results = [["start", engine.whose(), ""]]
    for step in STEPS:
        error = ""
        try:
            step(engine)
        except Exception as caught:  # the test looks at all of them
            error = f"{type(caught).__name__}: {caught}"
        results.append([step.__name__, engine.whose(), error])
        print(results[-1], flush=True)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
