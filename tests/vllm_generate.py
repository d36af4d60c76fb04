"""Generate with vLLM in a process of its own: ``python vllm_generate.py JOBS.json RESULTS.json``.

A job is ``{"model", "prompts": [[token id]], "max_tokens", "options": {of vllm.LLM}}``; its result holds
the tokens, their log-probabilities and those of the prompt, and what the process holds for the experts.
The transformers side of a comparison runs elsewhere, because vLLM changes classes of transformers.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams

from vllm_ext.moe_method import BitsMoEMethod

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "gpu_memory_utilization": 0.1,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


class LoadingMemory:
    """Bytes that this process gains while its packed layers are loaded; notes them layer by layer."""

    def __init__(self) -> None:
        self.before = self.peak = 0
        load = BitsMoEMethod.process_weights_after_loading

        def measured(method: BitsMoEMethod, layer: Any) -> None:
            if not self.before:
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
                self.before = self._status("VmRSS")
            load(method, layer)
            self.peak = self._status("VmHWM") - self.before

        BitsMoEMethod.process_weights_after_loading = measured  # type: ignore[method-assign]

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job."""
    options = {**DEFAULTS, **job.get("options", {})}
    alone = options.get("tensor_parallel_size", 1) == 1
    llm = LLM(job["model"], **options, **({"distributed_executor_backend": "uni"} if alone else {}))
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    sampling.detokenize = False
    prompts = job["prompts"]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    result: dict[str, Any] = {"sequences": []}
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        result["sequences"].append(
            {
                "prompt": prompt,
                "tokens": tokens,
                "logprobs": [
                    entry[token].logprob
                    for token, entry in zip(tokens, output.outputs[0].logprobs, strict=True)
                ],
                "prompt_logprobs": [
                    entry[token].logprob
                    for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
                ],
            }
        )
    if alone:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        layers = [m for m in model.modules() if isinstance(getattr(m, "quant_method", None), BitsMoEMethod)]
        result["expert_bytes"] = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    del llm
    gc.collect()
    return result


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), []
    memory = LoadingMemory()
    for job in jobs:
        memory.before = memory.peak = 0
        results.append(generate(job))
        results[-1]["loading_peak"] = memory.peak
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
