"""One method, in a process of its own: ``python -m bitsmoe_plugin.commands.compare.method METHOD DIR DEBUG``.

It reads the task as JSON from stdin, quantizes in the directory that it is given, evaluates against the
full-precision model and prints its row as JSON.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.error_lines import ToldError, told
from bitsmoe_plugin.base.stdout import stdout_to_stderr
from bitsmoe_plugin.base.waiting_threads import waiting_passively
from bitsmoe_plugin.commands.compare.process import last_words
from bitsmoe_plugin.commands.compare.runners import PACKAGES, RUNNERS, Quantized, expert_weights, load
from bitsmoe_plugin.commands.compare.task import ComparisonTask
from bitsmoe_plugin.commands.evaluate import evaluate_model, evaluation_text
from bitsmoe_plugin.errors import BitsMoEError, QuantizationError
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.models.model_class import text_model
from bitsmoe_plugin.models.tokenizer import load_tokenizer

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def _sizes(quantized: Quantized, reference: Any) -> dict[str, Any]:
    """Bytes that are stored and bits per weight, of the routed experts and of the whole model.

    Args:
        reference: the model in full precision; a method that says nothing of what is not an expert leaves it
            as it is here.
    """
    experts = {layer.name for layer in find_moe_layers(reference)}
    tensors = {p.data_ptr(): (name, p) for name, p in reference.named_parameters()}.values()  # tied ones once
    other = quantized.other_bytes
    if other is None:
        other = sum(p.nbytes for name, p in tensors if name.rpartition(".")[0] not in experts)
    total = quantized.expert_bytes + other
    return {
        "bits_per_weight": 8 * quantized.expert_bytes / expert_weights(reference),
        "expert_bytes": quantized.expert_bytes,
        "total_bytes": total,
        "total_bits_per_weight": 8 * total / sum(p.numel() for _, p in tensors),
    }


def _sample(model: Any, tokenizer: Any, task: ComparisonTask) -> str:
    inputs = tokenizer(task.prompt, return_tensors="pt", return_token_type_ids=False)
    # A repetition penalty, because small models repeat themselves under greedy search.
    options = {"max_new_tokens": task.new_tokens, "do_sample": False, "repetition_penalty": 1.3}
    output = text_model(model).generate(**inputs, **options)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def run_method(method: str, task: ComparisonTask, scratch: Path) -> dict[str, Any]:
    """Quantize and evaluate with one method, in this process.

    Args:
        scratch: an empty directory for what is thrown away.

    Returns:
        keys method, those of ``_sizes``, those of ``Evaluation`` that are known,
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
    quantized = RUNNERS[method](task, scratch)
    reference = load(task.source)
    result = evaluate_model(quantized.model, texts, reference=reference, batch_size=task.batch_size)
    row = {
        "method": method,
        **_sizes(quantized, reference),
        **{name: value for name, value in asdict(result).items() if value is not None},
        "quantize_seconds": quantized.seconds,
    }
    if task.tasks:
        from bitsmoe_plugin.commands.evaluate_tasks import evaluate_tasks

        row["tasks"] = evaluate_tasks(quantized.model, tokenizer, task.tasks, batch_size=task.batch_size)
    if task.prompt is not None:
        row["sample"] = _sample(quantized.model, tokenizer, task)
    return row


def in_process(method: str, task: ComparisonTask, debug: bool) -> dict[str, Any]:
    """The row of one method, from a process of its own; for errors see ``compare``."""
    command = [sys.executable, "-m", "bitsmoe_plugin.commands.compare.method", method]
    # Peers' processes, which inherit this, wait as they do wherever people run them.
    environment = None if method in PACKAGES else waiting_passively()
    given = json.dumps(asdict(task))
    # Made here, because a process that is killed removes nothing.
    with tempfile.TemporaryDirectory(prefix="bitsmoe-compare-", ignore_cleanup_errors=True) as scratch:
        command += [scratch, str(int(debug))]
        done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, env=environment)
    if not done.returncode:
        row: dict[str, Any] = json.loads(done.stdout)
        return row
    if done.returncode == INTERRUPTED:  # this process was, too, unless the signal was for the other alone
        raise KeyboardInterrupt
    message = f"method {method} failed: {last_words(done)}"
    raise QuantizationError(message) if done.returncode == 2 else ToldError(message)


def main() -> int:
    """Worker: task as JSON on stdin; method, scratch directory, and 1 to debug, as arguments; row or error as
    JSON on stdout."""
    method, scratch, debug = sys.argv[1:]
    # At once and without a word, also inside a layer: nothing is kept, and who started this process tells.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))
    try:
        with stdout_to_stderr() as stdout:
            row = run_method(method, ComparisonTask(**json.load(sys.stdin)), Path(scratch))
            json.dump(row, stdout)
    except Exception as error:
        if debug == "1":
            traceback.print_exc()
        print(json.dumps({"error": told(error, method)}))
        return 2 if isinstance(error, BitsMoEError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
