"""Side-by-side comparison of quantization methods, each in a process of its own.

The parent starts ``python -m bitsmoe_plugin.commands.compare.compare`` per method with the task as JSON on
stdin; the worker quantizes, evaluates against the full-precision model and prints its row as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.table import Table

from bitsmoe_plugin.base.error_lines import ToldError, told, working_on
from bitsmoe_plugin.base.option_checks import check_number
from bitsmoe_plugin.base.stdout import stdout_to_stderr
from bitsmoe_plugin.calibration.text import load_documents, token_blocks
from bitsmoe_plugin.checkpoint.read import check_if_packed
from bitsmoe_plugin.codec.backends import refuse_slow
from bitsmoe_plugin.commands.compare.texts import check_texts
from bitsmoe_plugin.commands.evaluate import check_evaluation, evaluate_model, evaluation_text
from bitsmoe_plugin.commands.evaluate_output import print_tasks
from bitsmoe_plugin.commands.tables import table_console
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import BitsMoEError, ConfigError, QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers, layer_shape
from bitsmoe_plugin.models.low_precision import method_of, stored_settings
from bitsmoe_plugin.models.low_precision_source import source_in
from bitsmoe_plugin.models.model_class import check_folder, check_weights, empty_model, load_model, text_model
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ComparisonTask:
    """What every method is given; see the options of ``bitsmoe compare``."""

    model: str
    bits: float
    factor_bits: float | None
    dataset: str
    eval: str
    calibration_tokens: int
    sequence_length: int
    batch_size: int
    seed: int
    max_tokens: int | None
    group_size: int
    prompt: str | None
    new_tokens: int
    checkpoint: str | None = None
    dense_bits: Any = 16
    size: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    allow_slow: bool = False
    loading: dict[str, Any] = field(default_factory=dict)
    """Options of ``ModelSource`` for the model and its tokenizer."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval."""

    @property
    def source(self) -> ModelSource:
        """Where the model is loaded from."""
        return ModelSource.of(self.model, **self.loading)

    def config(self) -> BitsMoEConfig:
        """The BitsMoE options of this task."""
        return BitsMoEConfig(
            bits=self.bits,
            factor_bits=self.factor_bits,
            dataset=self.dataset,
            calibration_tokens=self.calibration_tokens,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            seed=self.seed,
            dense_bits=self.dense_bits,
            size=self.size,
            chat_template_kwargs=self.chat_template_kwargs,
            allow_slow=self.allow_slow,
        )

    def check(self) -> None:
        """Raises ConfigError: an option has a value that is not allowed."""
        self.config()
        check_evaluation(self.sequence_length, self.max_tokens, None, self.batch_size)
        for name, least in (("group_size", 1), ("new_tokens", 0)):
            check_number(name, getattr(self, name), least, 10**9, whole=True, owner="compare")

    @property
    def baseline_bits(self) -> int:
        """Width of round-to-nearest and GPTQ: they have whole widths only, plus their overhead."""
        return max(2, int(self.bits))


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


def _expert_weights(model: Any) -> int:
    return sum(layer_shape(layer.module).weights for layer in find_moe_layers(model))


def _load(model: str | Path | ModelSource) -> Any:
    source = ModelSource.of(model)
    with working_on(f"loading {source.name}"):
        return load_model(source).eval()


def _full(task: ComparisonTask, scratch: Path) -> Quantized:
    model = _load(task.source)
    settings = stored_settings(task.source.config())
    files = source_in(task.source.directory(), model, settings) if settings is not None else None
    if files is not None:  # as they are stored, in low precision
        return Quantized(model, files.expert_bytes, 0.0, files.other_bytes)
    size = next(iter(find_moe_layers(model))).module.down_proj.element_size()
    return Quantized(model, size * _expert_weights(model), 0.0)


def _rtn(task: ComparisonTask, scratch: Path) -> Quantized:
    from bitsmoe_plugin.commands.compare.rtn import quantize_rtn

    model = _load(task.source)
    start = time.perf_counter()
    bits = quantize_rtn(model, task.baseline_bits, task.group_size)
    seconds = time.perf_counter() - start
    return Quantized(model, round(bits * _expert_weights(model) / 8), seconds)


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
    command += ["--trust-remote-code"] if task.source.trust_remote_code else []
    done = subprocess.run([*command, "--seed", str(task.seed)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ToldError(f"{module}: {_last_words(done)}")
    record = json.loads(done.stdout.strip().splitlines()[-1])
    model = load_gptq_model(out, _dtype(task)).eval()
    return Quantized(model, expert_bytes(out), record["quantize_seconds"], other_bytes(out))


def _dtype(task: ComparisonTask) -> torch.dtype:
    """Of the model that is compared with. GPTQ-format checkpoints say float16 whatever they were made from,
    in which a model with massive activations overflows."""
    return next(_load(task.source).parameters()).dtype


def _bitsmoe(task: ComparisonTask, scratch: Path) -> Quantized:
    from bitsmoe_plugin.commands.inspect import inspect_checkpoint
    from bitsmoe_plugin.commands.quantize import quantize_to_directory

    start = time.perf_counter()
    quantize_to_directory(task.source, scratch / "bitsmoe", task.config())
    seconds = time.perf_counter() - start
    return _packed(inspect_checkpoint(scratch / "bitsmoe"), _load(scratch / "bitsmoe"), seconds)


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
    return _packed(inspected, _load(path), 0.0)


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


def _other_bytes(quantized: Quantized, reference: Any) -> int:
    """What is stored besides the experts; rtn leaves it as it is here."""
    if quantized.other_bytes is not None:
        return quantized.other_bytes
    experts = {layer.name for layer in find_moe_layers(reference)}
    named = reference.named_parameters()
    return sum({p.data_ptr(): p.nbytes for n, p in named if n.rpartition(".")[0] not in experts}.values())


def _sample(model: Any, tokenizer: Any, task: ComparisonTask) -> str:
    inputs = tokenizer(task.prompt, return_tensors="pt", return_token_type_ids=False)
    # A repetition penalty, because small models repeat themselves under greedy search.
    options = {"max_new_tokens": task.new_tokens, "do_sample": False, "repetition_penalty": 1.3}
    output = text_model(model).generate(**inputs, **options)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def run_method(method: str, task: ComparisonTask) -> dict[str, Any]:
    """Quantize and evaluate with one method, in this process.

    Returns:
        keys method, bits_per_weight, expert_bytes, total_bytes, those of ``Evaluation`` that are known,
        quantize_seconds; tasks, and sample if the task has a prompt.
    """
    tokenizer = load_tokenizer(task.source)
    texts = evaluation_text(
        task.eval,
        tokenizer,
        sequence_length=task.sequence_length,
        max_tokens=task.max_tokens,
        chat_template_kwargs=task.chat_template_kwargs,
    )
    with tempfile.TemporaryDirectory(prefix="bitsmoe-compare-") as scratch:
        quantized = RUNNERS[method](task, Path(scratch))
        reference = _load(task.source)
        result = evaluate_model(quantized.model, texts, reference=reference, batch_size=task.batch_size)
        row = {
            "method": method,
            "bits_per_weight": 8 * quantized.expert_bytes / _expert_weights(reference),
            "expert_bytes": quantized.expert_bytes,
            "total_bytes": quantized.expert_bytes + _other_bytes(quantized, reference),
            **{name: value for name, value in asdict(result).items() if value is not None},
            "quantize_seconds": quantized.seconds,
        }
        if task.tasks:
            from bitsmoe_plugin.commands.evaluate_tasks import evaluate_tasks

            row["tasks"] = evaluate_tasks(quantized.model, tokenizer, task.tasks, batch_size=task.batch_size)
        if task.prompt is not None:
            row["sample"] = _sample(quantized.model, tokenizer, task)
    return row


def check_comparison(task: ComparisonTask, methods: tuple[str, ...]) -> None:
    """Refuse what would fail after another method's hours.

    Raises:
        ConfigError: unknown method or bad option.
        CheckpointError: a packed checkpoint is not sound.
        QuantizationError: text or model cannot be used.
    """
    unknown = [method for method in methods if method not in RUNNERS]
    if unknown or not methods:
        raise ConfigError(f"methods={','.join(methods)!r}: allowed are {', '.join(RUNNERS)}")
    if ("checkpoint" in methods) != (task.checkpoint is not None):
        raise ConfigError("method checkpoint and option --checkpoint need each other")
    task.check()
    if task.tasks:
        from bitsmoe_plugin.commands.evaluate_tasks import find_tasks

        find_tasks(task.tasks)
    if "bitsmoe" in methods:
        refuse_slow("cpu", task.allow_slow)
    for method in methods:
        if find_spec(PACKAGES.get(method, "torch")) is None:
            raise ConfigError(
                f"method {method} needs {PACKAGES[method]}, which is not there; run "
                f"`make install-{method.removesuffix('-all')}`"
            )
    source = task.source
    for path in (source.name, task.checkpoint):
        if path is not None:
            check_if_packed(path)
    config = source.config()
    settings = stored_settings(config)
    empty = empty_model(config)
    find_moe_layers(empty)
    peers = [method for method in methods if method in PACKAGES]
    if settings is not None and peers:
        raise ConfigError(
            f"method {peers[0]} takes a model in bfloat16, and {source.name} is stored by quant_method "
            f"{method_of(settings)!r}; leave it out, or give the model dequantized"
        )
    if Path(source.name).is_dir():
        check_weights(Path(source.name))
        check_folder(Path(source.name))
    check_texts(source, empty, task.dataset, task.eval, peers, task.chat_template_kwargs)


def compare(task: ComparisonTask, methods: tuple[str, ...], debug: bool = False) -> list[dict[str, Any]]:
    """One row per method, each from a process of its own.

    Args:
        debug: let the processes show where their errors come from.

    Raises:
        ConfigError, CheckpointError: see ``check_comparison``.
        QuantizationError: a method failed; with its message.
        ToldError: likewise, by an error of a library below.
    """
    check_comparison(task, methods)
    rows = []
    for number, method in enumerate(methods, 1):
        print(f"[{number}/{len(methods)}] {method}", file=sys.stderr, flush=True)
        rows.append(in_process(method, task, debug))
    return rows


def in_process(method: str, task: ComparisonTask, debug: bool) -> dict[str, Any]:
    """The row of one method, from a process of its own; for errors see ``compare``."""
    command = [sys.executable, "-m", "bitsmoe_plugin.commands.compare.compare", method, str(int(debug))]
    done = subprocess.run(command, input=json.dumps(asdict(task)), stdout=subprocess.PIPE, text=True)
    if not done.returncode:
        row: dict[str, Any] = json.loads(done.stdout)
        return row
    message = f"method {method} failed: {_last_words(done)}"
    raise QuantizationError(message) if done.returncode == 2 else ToldError(message)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """What a process that failed had to say: a JSON object with ``error`` at the end of its stdout."""
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode} (9: most often for lack of memory)"
    try:
        return str(json.loads(done.stdout.strip().splitlines()[-1])["error"])
    except (ValueError, LookupError, TypeError):
        return f"its process ended with status {done.returncode}; what it said is above"


def print_comparison(rows: list[dict[str, Any]], stream: TextIO) -> None:
    """The rows as a table, followed by the text samples."""
    console = table_console(stream)
    domains = sorted(rows[0]["per_domain"])
    sizes, quality = ("bits/weight", "expert bytes", "total bytes"), ("perplexity", "KL", "top-1", "seconds")
    table = Table("method", *sizes, *domains, *quality)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['expert_bytes']:,}",
            f"{row['total_bytes']:,}",
            *(f"{row['per_domain'][domain]:.2f}" for domain in domains),
            f"{row['perplexity']:.2f}",
            f"{row['kl_divergence']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['quantize_seconds']:.1f}",
        )
    console.print(table)
    console.print("bits/weight: everything stored for the routed experts over their number of weights.")
    if "tasks" in rows[0]:
        print_tasks(
            {f"{task}, {row['method']}": row["tasks"][task] for task in rows[0]["tasks"] for row in rows},
            console,
        )
    for row in rows:
        if "sample" in row:
            console.print(f"\n[bold]{row['method']}[/bold]: {row['sample']}", highlight=False)


def main() -> int:
    """Worker: task as JSON on stdin; method, and 1 to debug, as arguments; row or error as JSON on stdout."""
    try:
        with stdout_to_stderr() as stdout:
            row = run_method(sys.argv[1], ComparisonTask(**json.load(sys.stdin)))
            json.dump(row, stdout)
    except Exception as error:
        if sys.argv[2:] == ["1"]:
            traceback.print_exc()
        print(json.dumps({"error": told(error, sys.argv[1])}))
        return 2 if isinstance(error, BitsMoEError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
