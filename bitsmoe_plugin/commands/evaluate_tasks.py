"""Tasks of lm-eval (the language model evaluation harness) on a model that is loaded already."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bitsmoe_plugin.commands import bundled_tasks
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.model_class import text_model

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(
        f'tasks are run by lm-eval, which cannot be imported ({error}); pip install "bitsmoe-plugin[lm-eval]"'
    ) from error


def language_model(model: Any, tokenizer: Any, batch_size: int) -> HFLM:
    """The model as lm-eval calls it.

    It computes in the dtype that it was loaded in; its softmax is in float32. lm-eval's default takes it
    in the dtype of the logits, and in bfloat16 a log-likelihood of -10 is a multiple of 0.0625: too coarse
    to tell two answers, or two quantized models, apart.
    """
    return HFLM(
        pretrained=text_model(model),
        tokenizer=tokenizer,
        batch_size=batch_size,
        softmax_dtype="float32",
        backend="causal",
    )


def find_tasks(names: Sequence[str], task_dir: Path | None = None) -> TaskManager:
    """lm-eval's tasks, with ``last_word``, which comes with this package, and those of a directory.

    Args:
        names: tasks, groups or tags that must be among them.
        task_dir: directory with tasks as .yaml files, which take precedence.

    Raises:
        ConfigError: no such directory or task.
    """
    if task_dir is not None and not task_dir.is_dir():
        raise ConfigError(f"task directory {task_dir} does not exist")
    manager = _manager(task_dir)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ConfigError(
                f"task {name!r} is not known to lm-eval{f' or in {task_dir}' if task_dir else ''}"
                + (f"; did you mean {', '.join(close)}?" if close else "; `lm-eval ls tasks` lists its own")
            )
    return manager


@cache
def _manager(task_dir: Path | None) -> TaskManager:
    """It reads thousands of files, which takes seconds."""
    # Of two tasks with one name the later counts: the user's.
    return TaskManager(include_path=[str(bundled_tasks.FOLDER), *([str(task_dir)] if task_dir else [])])


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_dir: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    unsafe_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Run tasks; their data comes from the hub, unless a task names files, or is bundled.

    Args:
        tasks: names of tasks, groups or tags.
        task_dir: see ``find_tasks``.
        few_shot: examples in each prompt; None: as the task says.
        limit: only the first examples of each task, to try things out.
        batch_size: sequences per forward pass.
        unsafe_code: also run tasks that execute what the model writes, such as humaneval (whose metric
            wants the environment variable HF_ALLOW_CODE_EVAL=1 besides).

    Returns:
        task -> metric -> value; ``acc_stderr`` is the standard error of ``acc``, a filter other than
        "none" is part of a metric's name (``exact_match,strict``), ``samples`` is the number of examples.

    Raises:
        ConfigError: no such directory or task.
    """
    results = simple_evaluate(
        language_model(model, tokenizer, batch_size),
        tasks=list(tasks),
        task_manager=find_tasks(tasks, task_dir),
        num_fewshot=few_shot,
        limit=limit,
        log_samples=False,
        confirm_run_unsafe_code=unsafe_code,
    )
    samples = results["n-samples"]
    return {
        name: {**_metrics(values), **({"samples": samples[name]["effective"]} if name in samples else {})}
        for name, values in results["results"].items()
    }


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Without lm-eval's entries that are no numbers: alias, and "N/A" for errors that have no formula."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if "," in name}
