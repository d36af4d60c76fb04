"""What one model class must get through in vLLM: ``python serving.py``'s side that imports vLLM."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from model_classes import ModelClass
from vllm import LLM, SamplingParams

STEPS = ("served unquantized", "served")
SECONDS = 500
"""That one engine may take."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""In log-probabilities. In bfloat16 twice what that changes in transformers, where it was measured."""
_DTYPE = re.compile(r"dtype|b?float|half|bf16", re.IGNORECASE)
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": False,  # vLLM turns it off on a CPU, too late for models with linear attention
    "max_model_len": 128,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.1,
    "disable_log_stats": True,
    "distributed_executor_backend": "uni",
    "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
}


def steps(entry: ModelClass, folder: Path) -> dict[str, str]:
    """Name of each step -> "yes", or why not, or by how much it differs; the packed model is not tried if
    vLLM does not run the unquantized one."""
    reference = json.loads((folder / "reference.json").read_text())
    found, answers = {}, {}
    for name, directory in zip(STEPS, ("plain", "packed"), strict=True):
        for dtype in TOLERANCE:  # some of vLLM's kernels for the CPU exist in bfloat16 only
            if dtype != "float32" and not _DTYPE.search(found[name]):
                break
            answer, found[name] = _in_child(folder / directory, dtype, reference)
            if answer is not None:
                answers[name], found["class in vLLM"] = answer, answer[0]["class"]
                found[name] = _judge(max(map(_difference, answer, reference)), dtype, reference)
                break
        if name not in answers:
            break
    if len(answers) == len(STEPS):
        own = max(_between(a, b) for a, b in zip(*answers.values(), strict=True))
        found["packed against unquantized"] = f"{own:.2g}"
    return found


def _judge(difference: float, dtype: str, reference: list[dict[str, Any]]) -> str:
    tolerance = TOLERANCE[dtype]
    if dtype == "bfloat16" and "rounding" in reference[0]:
        tolerance = 2 * max(r["rounding"] for r in reference)
    text = "yes" if difference < tolerance else f"differs by {difference:.2g}"
    return text if dtype == "float32" else f"{text} ({dtype})"


def _in_child(model: Path, dtype: str, reference: list[dict[str, Any]]) -> tuple[Any, str]:
    """(answers, "") or (None, why not) of an engine in a process of its own: one that failed leaves vLLM's
    state of the process as it is."""
    context = multiprocessing.get_context("fork")  # vLLM is imported once
    ours, theirs = context.Pipe()
    child = context.Process(target=_send, args=(theirs, model, dtype, reference))
    child.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return None, f"takes more than {SECONDS} seconds"
        return ours.recv()
    except EOFError:
        child.join()
        return None, f"ends its process (exit status {child.exitcode})"
    finally:
        child.kill()
        child.join()


def _send(connection: Any, model: Path, dtype: str, reference: list[dict[str, Any]]) -> None:
    try:
        connection.send((_answers(model, dtype, reference), ""))
    except Exception as error:  # of vLLM, of any kind: it is a result here
        connection.send((None, _one_line(error, model)))


def _answers(model: Path, dtype: str, reference: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities of the reference's tokens, and what is generated after its prompts."""
    tokenizer = (model / "tokenizer.json").exists()
    llm = LLM(str(model), dtype=dtype, **OPTIONS, skip_tokenizer_init=not tokenizer)
    whole = _run(llm, [r["tokens"] for r in reference], 1)
    short = _run(llm, [r["tokens"][: r["prompt"]] for r in reference], len(reference[0]["leads"]))
    model_class = llm.llm_engine.model_config.architecture
    return [
        {**a, "generated": b["generated"], "found": b["found"], "class": model_class}
        for a, b in zip(whole, short, strict=True)
    ]


def _run(llm: LLM, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=0, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        made = list(output.outputs[0].token_ids)
        found.append(
            {
                "logprobs": [
                    e[t].logprob for t, e in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
                ],
                "generated": made,
                "found": [e[t].logprob for t, e in zip(made, output.outputs[0].logprobs, strict=True)],
            }
        )
    return found


def _difference(answer: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest of any log-probability, or of what a greedy token is behind the reference's."""
    pairs = zip(answer["logprobs"], reference["logprobs"], strict=True)
    worst = max(abs(a - b) for a, b in pairs)
    start = reference["prompt"]
    wanted = zip(
        reference["tokens"][start:], reference["logprobs"][start - 1 :], reference["leads"], strict=True
    )
    for token, value, (expected, logprob, lead) in zip(
        answer["generated"], answer["found"], wanted, strict=True
    ):
        if token != expected:
            return max(worst, lead)
        worst = max(worst, abs(value - logprob))
    return worst


def _between(first: dict[str, Any], second: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(first["logprobs"], second["logprobs"], strict=True))


def _one_line(error: Exception, model: Path) -> str:
    """With the place that raised it; a path of the model is cut out before the text is cut short."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}".replace(str(model), "MODEL")
    text = " ".join(text.split())[:300]
    return f"{text} ({Path(last.filename).name}:{last.lineno})"
