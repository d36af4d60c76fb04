"""Side-by-side comparison of quantization methods, each in a process of its own (see ``method``)."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from bitsmoe_plugin.checkpoint.read import check_if_packed
from bitsmoe_plugin.codec.backends import refuse_slow
from bitsmoe_plugin.commands.compare.method import in_process
from bitsmoe_plugin.commands.compare.runners import PACKAGES, RUNNERS
from bitsmoe_plugin.commands.compare.task import ComparisonTask
from bitsmoe_plugin.commands.compare.texts import check_texts, check_tuning_text
from bitsmoe_plugin.commands.evaluate_output import print_tasks
from bitsmoe_plugin.commands.tables import table_console
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.models.low_precision import method_of, stored_settings
from bitsmoe_plugin.models.model_class import check_folder, check_weights, empty_model


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
    if "bitsmoe" in methods and task.tune:
        check_tuning_text(source, task.config())


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


def print_comparison(rows: list[dict[str, Any]], stream: TextIO) -> None:
    """The rows as a table, followed by the text samples."""
    console = table_console(stream)
    domains = sorted(rows[0]["per_domain"])
    sizes, quality = (
        ("bits/weight", "expert bytes", "total bytes", "of all"),
        ("perplexity", "KL", "top-1", "seconds"),
    )
    table = Table("method", *sizes, *domains, *quality)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['expert_bytes']:,}",
            f"{row['total_bytes']:,}",
            f"{row['total_bits_per_weight']:.3f}",
            *(f"{row['per_domain'][domain]:.2f}" for domain in domains),
            f"{row['perplexity']:.2f}",
            f"{row['kl_divergence']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['quantize_seconds']:.1f}",
        )
    console.print(table)
    console.print("bits/weight: everything stored for the routed experts over their number of weights;")
    console.print("of all: everything stored for the model over the number of its weights.")
    if "tasks" in rows[0]:
        print_tasks(
            {f"{task}, {row['method']}": row["tasks"][task] for task in rows[0]["tasks"] for row in rows},
            console,
        )
    for row in rows:
        if "sample" in row:
            console.print(f"\n[bold]{row['method']}[/bold]: {row['sample']}", highlight=False)
