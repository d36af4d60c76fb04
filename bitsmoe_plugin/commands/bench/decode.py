"""``bench decode``: generated tokens per second of whole models, through transformers and vLLM.

Every model runs in a process of its own, which is given the task as JSON on stdin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.stdout import stdout_to_stderr
from bitsmoe_plugin.checkpoint.read import check_if_packed
from bitsmoe_plugin.commands.bench.output import Row
from bitsmoe_plugin.errors import BitsMoEError, ConfigError


def _prompts(task: dict[str, Any], sequences: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, others for each sequence: those of equal prompts would all go to the same experts."""
    import torch

    generator = torch.Generator().manual_seed(0)
    sizes = sequences, task["prompt_tokens"]
    return torch.randint(vocabulary, sizes, generator=generator).tolist()  # type: ignore[no-any-return]


def _transformers(task: dict[str, Any]) -> Callable[[int, int], None]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=task["dtype"]).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    vocabulary = model.config.get_text_config().vocab_size

    def generate(batch: int, tokens: int) -> None:
        prompts = torch.tensor(_prompts(task, batch, vocabulary), device=model.device)
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return generate


def _vllm(task: dict[str, Any]) -> Callable[[int, int], None]:
    from vllm import LLM, SamplingParams

    length = task["prompt_tokens"] + task["new_tokens"]
    # Without its cache of prompts, or each would be computed once for all repetitions.
    options = {"max_model_len": length, "enable_prefix_caching": False, "disable_log_stats": True}
    engine = LLM(task["model"], dtype=task["dtype"], **options)
    vocabulary = engine.model_config.get_vocab_size()

    def generate(batch: int, tokens: int) -> None:
        prompts = [{"prompt_token_ids": ids} for ids in _prompts(task, batch, vocabulary)]
        options = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        engine.generate(prompts, options, use_tqdm=False)

    return generate


ENGINES: dict[str, Callable[[dict[str, Any]], Callable[[int, int], None]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
}


def run(task: dict[str, Any]) -> list[float]:
    """Seconds for each batch size of the task, the best of three."""
    generate, tokens = ENGINES[task["engine"]](task), task["new_tokens"]
    taken = []
    for batch in task["batches"]:
        generate(batch, tokens)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            generate(batch, tokens)
            best = min(best, time.perf_counter() - start)
        taken.append(best)
    return taken


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per engine, batch size and model.

    Raises:
        ConfigError: unknown engine.
        CheckpointError: a packed model is not sound.
        BitsMoEError: a model could not be run; its message has gone to stderr.
    """
    possible = [name for name in ENGINES if find_spec(name)]
    engines = args.engines.split(",") if args.engines else possible
    if not set(engines) <= set(possible):
        raise ConfigError(f"--engines {args.engines}: installed here are {', '.join(possible)}")
    for model in args.models:
        check_if_packed(model)
    batches = args.batch
    rows = []
    for engine in engines:
        seconds = []
        for model in args.models:
            task = {"engine": engine, "model": model, "batches": batches}
            task |= {"new_tokens": args.new_tokens, "prompt_tokens": args.prompt_tokens}
            task["dtype"] = args.dtype
            command = [sys.executable, "-c", f"from {__name__} import main; main()"]
            done = subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise BitsMoEError(f"{engine} could not run {model}; its own message is above")
            seconds.append(json.loads(done.stdout.splitlines()[0]))  # vLLM says good-bye on stdout
        rows += [
            {
                "engine": engine,
                "batch": batch,
                "model": Path(model).name,
                "seconds": of_model[i],
                "tokens_per_second": batch * args.new_tokens / of_model[i],
                "speed_over_first": seconds[0][i] / of_model[i],
            }
            for i, batch in enumerate(batches)
            for model, of_model in zip(args.models, seconds, strict=True)
        ]
    return rows


def main() -> None:
    """Worker. Importing it has registered the method with transformers."""
    with stdout_to_stderr() as stdout:
        print(json.dumps(run(json.load(sys.stdin))), file=stdout)
