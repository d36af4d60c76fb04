"""Results of ``bitsmoe evaluate --json`` or ``bitsmoe compare --json`` for a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmoe_plugin.checkpoint.untrusted_values import number
from bitsmoe_plugin.errors import ConfigError

THIS = "this checkpoint"


@dataclass(frozen=True)
class EvaluationRow:
    """One model; what was not measured is None.

    Attributes:
        method: as ``compare`` names it; "this checkpoint" for what ``evaluate`` measured.
        bits: counted bits per expert weight.
        divergence: nats per token from the full-precision model.
        agreement: share of tokens with the same most likely token.
        median, most, nearly_all: divergence of the median token, and what 99 and 99.9 % do not exceed.
        change: of the probability of the text's tokens, root mean square.
        routing: share of tokens for which other experts are selected.
        routing_by_layer: the same by path of the experts module.
        domains: name -> perplexity.
    """

    method: str
    bits: float | None
    perplexity: float | None
    divergence: float | None
    agreement: float | None
    tokens: float | None
    median: float | None
    most: float | None
    nearly_all: float | None
    change: float | None
    routing: float | None
    routing_by_layer: dict[str, float]
    domains: dict[str, float]


@dataclass(frozen=True)
class TaskRow:
    """One metric of a task of lm-eval."""

    task: str
    metric: str
    value: float
    error: float | None


@dataclass(frozen=True)
class EvaluationData:
    """Attributes:
    rows: perplexity, by model.
    tasks: results of lm-eval.
    """

    rows: tuple[EvaluationRow, ...]
    tasks: tuple[TaskRow, ...]

    @property
    def domains(self) -> list[str]:
        """All names of domains, sorted; none if there is only one, which says what the whole does."""
        names = sorted({name for row in self.rows for name in row.domains})
        return names if len(names) > 1 else []


def read_evaluation(path: Path) -> EvaluationData:
    """Read what ``evaluate --json`` or ``compare --json`` printed.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"evaluation {path} cannot be read as JSON ({error})") from error
    values = values if isinstance(values, dict) else {}
    results = values.get("results")
    if isinstance(results, list):
        rows = [_row(row) for row in results if isinstance(row, dict)]
    else:
        rows = [_row({"method": THIS, **values})]
    rows = [row for row in rows if row.perplexity is not None]
    tasks = task_rows(values.get("tasks"))
    for row in results if isinstance(results, list) else ():
        if isinstance(row, dict) and isinstance(row.get("tasks"), dict):
            tasks += task_rows({f"{task}, {row.get('method')}": row["tasks"][task] for task in row["tasks"]})
    if not rows and not tasks:
        raise ConfigError(
            f"evaluation {path} holds no perplexity and no tasks; give what `bitsmoe evaluate --json` or "
            "`bitsmoe compare --json` wrote"
        )
    return EvaluationData(tuple(rows), tasks)


def _row(values: dict[str, Any]) -> EvaluationRow:
    return EvaluationRow(
        method=str(values.get("method", "?")),
        bits=number(values, "bits_per_weight"),
        perplexity=number(values, "perplexity"),
        divergence=number(values, "kl_divergence"),
        agreement=number(values, "top1_agreement"),
        tokens=number(values, "tokens"),
        median=number(values, "kl_median"),
        most=number(values, "kl_99"),
        nearly_all=number(values, "kl_999"),
        change=number(values, "probability_change"),
        routing=number(values, "routing_change"),
        routing_by_layer=_numbers(values.get("routing_change_by_layer")),
        domains=_numbers(values.get("per_domain")),
    )


def _numbers(values: Any) -> dict[str, float]:
    """What of a table is numbers."""
    values = values if isinstance(values, dict) else {}
    return {name: value for name in values if (value := number(values, name)) is not None}


def task_rows(tasks: Any) -> tuple[TaskRow, ...]:
    """Rows of ``tasks`` of ``evaluate --json``; metrics are lm-eval's: ``acc``, next to it ``acc_stderr``."""
    rows = []
    for task, values in tasks.items() if isinstance(tasks, dict) else ():
        for metric in values if isinstance(values, dict) else ():
            name, comma, filtered = metric.partition(",")
            value = number(values, metric)
            if metric != "samples" and "_stderr" not in name and value is not None:
                rows.append(TaskRow(task, metric, value, number(values, f"{name}_stderr{comma}{filtered}")))
    return tuple(rows)
