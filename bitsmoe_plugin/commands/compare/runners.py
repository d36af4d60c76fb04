"""How each method of a comparison quantizes a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitsmoe_plugin.base.error_lines import ToldError, working_on
from bitsmoe_plugin.calibration.text import load_documents, token_blocks
from bitsmoe_plugin.commands.compare.process import last_words
from bitsmoe_plugin.commands.compare.task import ComparisonTask
from bitsmoe_plugin.models.families import find_moe_layers, layer_shape
from bitsmoe_plugin.models.low_precision import stored_settings
from bitsmoe_plugin.models.low_precision_source import source_in
from bitsmoe_plugin.models.model_class import load_model
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Quantized:
    """Attributes:
    model: ready to evaluate.
    expert_bytes: everything stored for the routed experts.
    other_bytes: everything else that is stored; None: as the unquantized model has it.
    seconds: spent in quantization, without loading and evaluation.
    """

    model: Any
    expert_bytes: int
    seconds: float
    other_bytes: int | None = None


def expert_weights(model: Any) -> int:
    return sum(layer_shape(layer.module).weights for layer in find_moe_layers(model))


def load(model: str | Path | ModelSource) -> Any:
    source = ModelSource.of(model)
    with working_on(f"loading {source.name}"):
        return load_model(source).eval()


def _full(task: ComparisonTask, scratch: Path) -> Quantized:
    model = load(task.source)
    settings = stored_settings(task.source.config())
    files = source_in(task.source.directory(), model, settings) if settings is not None else None
    if files is not None:  # as they are stored, in low precision
        return Quantized(model, files.expert_bytes, 0.0, files.other_bytes)
    size = next(iter(find_moe_layers(model))).module.down_proj.element_size()
    return Quantized(model, size * expert_weights(model), 0.0)


def _rtn(task: ComparisonTask, scratch: Path) -> Quantized:
    from bitsmoe_plugin.commands.compare.rtn import quantize_rtn

    model = load(task.source)
    start = time.perf_counter()
    bits = quantize_rtn(model, task.baseline_bits, task.group_size)
    seconds = time.perf_counter() - start
    return Quantized(model, round(bits * expert_weights(model) / 8), seconds)


def _peer(module: str, options: tuple[str, ...], task: ComparisonTask, scratch: Path) -> Quantized:
    """Run ``comparison.<module>`` in a process of its own and read the GPTQ-format checkpoint it writes."""
    from bitsmoe_plugin.commands.compare.gptq_checkpoint import expert_bytes, load_gptq_model, other_bytes

    tokenizer = load_tokenizer(task.source)
    blocks = token_blocks(
        load_documents(task.dataset),
        tokenizer,
        sequence_length=task.sequence_length,
        max_tokens=task.calibration_tokens,
        vocab_size=len(tokenizer),
        seed=task.seed,
        chat_template_kwargs=task.chat_template_kwargs,
    )
    calibration, out = scratch / "calibration.json", scratch / "peer"
    calibration.write_text(json.dumps(blocks.tolist()))
    command = [sys.executable, "-m", f"bitsmoe_plugin.commands.compare.{module}", *options]
    command += ["--model", str(task.source.directory()), "--out", str(out), "--calibration", str(calibration)]
    command += ["--bits", str(task.baseline_bits), "--group-size", str(task.group_size)]
    command += ["--iters", str(task.autoround_steps)] if module == "autoround_quantize" else []
    command += ["--trust-remote-code"] if task.source.trust_remote_code else []
    done = subprocess.run([*command, "--seed", str(task.seed)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ToldError(f"{module}: {last_words(done)}")
    record = json.loads(done.stdout.strip().splitlines()[-1])
    model = load_gptq_model(out, _dtype(task)).eval()
    return Quantized(model, expert_bytes(out), record["quantize_seconds"], other_bytes(out))


def _dtype(task: ComparisonTask) -> torch.dtype:
    """Of the model that is compared with. GPTQ-format checkpoints say float16 whatever they were made from,
    in which a model with massive activations overflows."""
    return next(load(task.source).parameters()).dtype


def _bitsmoe(task: ComparisonTask, scratch: Path) -> Quantized:
    from bitsmoe_plugin.commands.inspect import inspect_checkpoint
    from bitsmoe_plugin.commands.quantize import quantize_to_directory

    start = time.perf_counter()
    quantize_to_directory(task.source, scratch / "bitsmoe", task.config())
    seconds = time.perf_counter() - start
    return _packed(inspect_checkpoint(scratch / "bitsmoe"), load(scratch / "bitsmoe"), seconds)


def _packed(inspected: dict[str, Any], model: Any, seconds: float) -> Quantized:
    size = inspected["expert_bytes"]
    return Quantized(model, size, seconds, inspected["total_bytes"] - size)


def _checkpoint(task: ComparisonTask, scratch: Path) -> Quantized:
    """A GPTQ checkpoint of AutoGPTQ or GPTQModel, or a packed one, that is there already."""
    from bitsmoe_plugin.commands.compare.gptq_checkpoint import (
        expert_bytes,
        is_gptq,
        load_gptq_model,
        other_bytes,
    )
    from bitsmoe_plugin.commands.inspect import inspect_checkpoint

    path = Path(str(task.checkpoint))
    if is_gptq(path):
        model = load_gptq_model(path, _dtype(task)).eval()
        return Quantized(model, expert_bytes(path), 0.0, other_bytes(path))
    inspected = inspect_checkpoint(path)  # first: it refuses what a loader would trip over
    return _packed(inspected, load(path), 0.0)


PACKAGES = {"gptq": "gptqmodel", "autoround": "auto_round"}
PACKAGES |= {f"{name}-all": package for name, package in PACKAGES.items()}
"""Packages that methods need besides what this one requires."""
RUNNERS: dict[str, Callable[[ComparisonTask, Path], Quantized]] = {
    "full": _full,
    "rtn": _rtn,
    "gptq": partial(_peer, "gptq_quantize", ()),
    # Asymmetric, because that came out better than its default (55.93 to 56.20, bundled model, 2 bits).
    "autoround": partial(_peer, "autoround_quantize", ("--no-sym",)),
    # Attention, shared experts and dense layers like the experts; routers, embeddings and head stay.
    "gptq-all": partial(_peer, "gptq_quantize", ("--all-layers",)),
    "autoround-all": partial(_peer, "autoround_quantize", ("--no-sym", "--all-layers")),
    "bitsmoe": _bitsmoe,
    "checkpoint": _checkpoint,
}
