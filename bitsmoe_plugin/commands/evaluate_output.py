"""What ``evaluate`` found, as tables and sentences."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from bitsmoe_plugin.commands.tables import layer_label, table_console


def print_evaluation(result: dict[str, Any], stream: TextIO) -> None:
    """Perplexity per domain and overall, divergence from the reference and results of tasks, as tables."""
    console = table_console(stream)
    if "perplexity" in result:
        _print_text(result, console)
    if "tasks" in result:
        print_tasks(result["tasks"], console)


def print_tasks(tasks: dict[str, dict[str, float]], console: Console) -> None:
    """Every metric of every task, with its standard error."""
    table = Table("task", "metric", "value", "standard error", "examples")
    for task, values in tasks.items():
        for metric in [m for m in values if m != "samples" and "_stderr" not in m]:
            name, comma, filtered = metric.partition(",")
            error = values.get(f"{name}_stderr{comma}{filtered}")
            samples = values.get("samples")
            table.add_row(
                task,
                metric,
                f"{values[metric]:.4f}",
                "-" if error is None else f"{error:.4f}",
                "-" if samples is None else f"{samples:.0f}",
            )
    console.print(table)


def _print_text(result: dict[str, Any], console: Console) -> None:
    table = Table("text", "perplexity")
    for domain, perplexity in result["per_domain"].items():
        table.add_row(domain, f"{perplexity:.3f}")
    table.add_row(f"all ({result['tokens']:,} tokens)", f"{result['perplexity']:.3f}", style="bold")
    console.print(table)
    if "kl_divergence" in result:
        for line in told_divergence(result):
            console.print(line, highlight=False)
        _print_routing(result, console)


def told_divergence(result: dict[str, Any]) -> list[str]:
    """Sentences about the distance from the reference, of what was measured."""
    kl = f"KL divergence from the reference: {result['kl_divergence']:.4f} nats per token"
    if "kl_median" in result:
        kl += (
            f" (median {result['kl_median']:.4f}, 99 % of tokens up to {result['kl_99']:.4f}, 99.9 % up to "
            f"{result['kl_999']:.4f})"
        )
    lines = [f"{kl}; same most likely token: {100 * result['top1_agreement']:.1f} %"]
    if "probability_change" in result:
        change = f"{100 * result['probability_change']:.2f} percentage points (root mean square)"
        lines.append(f"The probability of the text's tokens moved by {change}.")
    if "routing_change" in result:
        change = f"{100 * result['routing_change']:.2f} % of tokens, mean of the layers"
        lines.append(f"Another set of experts is selected for {change}.")
    if "routing_unknown" in result:
        lines.append(f"How often other experts are selected is not known: {result['routing_unknown']}")
    return lines


def _print_routing(result: dict[str, Any], console: Console) -> None:
    layers = result.get("routing_change_by_layer")
    if not layers:
        return
    table = Table("layer", "tokens with other experts")
    for position, (name, share) in enumerate(layers.items()):
        table.add_row(layer_label(name, position), f"{100 * share:.2f} %")
    console.print(table)
