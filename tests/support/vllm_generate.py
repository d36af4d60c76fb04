"""Generate with vLLM in a process of its own: ``python vllm_generate.py JOBS.json RESULTS.json``.

A job is ``{"model", "prompts": [[token id]], "max_tokens", "options": {of vllm.LLM}}``; its result holds
the tokens, their log-probabilities and those of the prompt (as vLLM expanded it), and what the process holds
for the experts. A job may also have "images" (files of images for each prompt), "again" (generate again,
shuffled, then one prompt at a time), "adapter" (directory of a LoRA adapter to generate with),
"refused_adapters" (directories; the result holds the messages) and "refused" (the engine must not start; the
result is ``{"error"}``).
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

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

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


def start(job: dict[str, Any]) -> LLM:
    """The engine of a job."""
    options = {**DEFAULTS, **job.get("options", {})}
    if _alone(job):
        options["distributed_executor_backend"] = "uni"
    if "speculative_config" in options:
        options["disable_log_stats"] = False
    return LLM(job["model"], **options)


def _alone(job: dict[str, Any]) -> bool:
    return job.get("options", {}).get("tensor_parallel_size", 1) == 1


def sequences(
    llm: LLM, job: dict[str, Any], prompts: list[list[int]], **options: Any
) -> list[dict[str, Any]]:
    """What the engine makes of prompts in one batch."""
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    sampling.detokenize = False
    inputs: list[Any] = [{"prompt_token_ids": p} for p in prompts]
    for entry, files in zip(inputs, job.get("images", ()), strict=False):
        entry["multi_modal_data"] = {"image": [Image.open(file) for file in files]}
    found = []
    for output in llm.generate(inputs, sampling, use_tqdm=False, **options):
        tokens = list(output.outputs[0].token_ids)
        prompt = list(output.prompt_token_ids)
        found.append(
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
    return found


def again(llm: LLM, job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The prompts of a job in another order, put back into theirs, and one at a time."""
    prompts = job["prompts"]
    order = sorted(range(len(prompts)), key=lambda i: (7 * i + 3) % len(prompts))
    shuffled = dict(zip(order, sequences(llm, job, [prompts[i] for i in order]), strict=True))
    return [[shuffled[i] for i in range(len(prompts))], [sequences(llm, job, [p])[0] for p in prompts]]


def refusal(llm: LLM, number: int, adapter: str) -> str:
    """Why an engine does not take an adapter, "" if it does."""
    try:
        llm.llm_engine.add_lora(LoRARequest(adapter, number, adapter))
    except Exception as error:
        return str(error)
    return ""


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job."""
    if job.get("refused"):
        try:
            start(job)
        except Exception as error:
            return {"error": str(error)}
        return {"error": ""}
    llm = start(job)
    result: dict[str, Any] = {"sequences": sequences(llm, job, job["prompts"])}
    if job.get("again"):
        result["again"] = again(llm, job)
    if "adapter" in job:
        request = LoRARequest("adapter", 1, job["adapter"])
        result["adapted"] = sequences(llm, job, job["prompts"], lora_request=request)
    result["refusals"] = [refusal(llm, 2 + i, a) for i, a in enumerate(job.get("refused_adapters", []))]
    if "speculative_config" in job.get("options", {}):
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        result["drafted"] = counts["vllm:spec_decode_num_draft_tokens"]
        result["accepted"] = counts["vllm:spec_decode_num_accepted_tokens"]
    if _alone(job):
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
