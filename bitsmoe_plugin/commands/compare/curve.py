"""Quality against counted bits: methods at many budgets, each point kept as soon as it is there.

The same command goes on where an interrupted one stopped. A point is taken over only if everything that it
depends on is as it was: method, options, code, libraries, model and text.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.atomic_output import replace_file
from bitsmoe_plugin.commands import bundled_tasks
from bitsmoe_plugin.commands.compare.compare import check_comparison
from bitsmoe_plugin.commands.compare.method import in_process
from bitsmoe_plugin.commands.compare.runners import PACKAGES
from bitsmoe_plugin.commands.compare.task import ComparisonTask
from bitsmoe_plugin.commands.report import check_report_extra
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.pipeline.run_identity import source_files

ONCE = ("full", "checkpoint")
"""Methods that no budget changes."""
BUDGETED = ("bitsmoe",)
"""Methods that take any budget; the others have whole widths."""
WHOLE_WIDTHS = (2, 3, 4, 8)
_AUTOROUND = ("autoround", "autoround-all")
OPTIONS_OF = {
    "dense_bits": BUDGETED,
    "tune": BUDGETED,
    "tune_through": BUDGETED,
    "allow_slow": BUDGETED,
    "autoround_steps": _AUTOROUND,
    "group_size": ("rtn", "gptq", "gptq-all", *_AUTOROUND),
    "checkpoint": ("checkpoint",),
}
"""Options of single methods; all others are of every method, or of one budget alone."""
POINTS, RESULT = "points", "curve.json"
_AT_ONCE = 2**24
"""Bytes of a file that are in memory."""
_LIBRARIES = ("torch", "transformers", "numpy", "highspy", "lm_eval", *PACKAGES.values())


@dataclass(frozen=True)
class Point:
    """Attributes:
    name: of its file.
    task: with the budget of this point.
    """

    method: str
    name: str
    task: ComparisonTask


def points(task: ComparisonTask, methods: Sequence[str], budgets: Sequence[float]) -> list[Point]:
    """What is measured: our method at every budget, others at each of their widths that is in the range.

    Raises:
        ConfigError: a method has no width in the range, or an option that only one budget has.
    """
    for option in ("factor_bits", "size", "prompt"):
        if getattr(task, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} is for one budget; leave it out of a range")
    found = []
    for method in methods:
        if method in ONCE:
            found.append(Point(method, method, replace(task, bits=budgets[-1])))
            continue
        widths = budgets if method in BUDGETED else _widths(method, budgets)
        found += [Point(method, f"{method}-{bits:g}", replace(task, bits=bits)) for bits in widths]
    return found


def _widths(method: str, budgets: Sequence[float]) -> list[float]:
    widths = [float(width) for width in WHOLE_WIDTHS if budgets[0] <= width <= budgets[-1]]
    if not widths:
        raise ConfigError(
            f"method {method} has widths of {', '.join(map(str, WHOLE_WIDTHS))} bits, and none is from "
            f"{budgets[0]:g} to {budgets[-1]:g}; leave it out, or take another range"
        )
    return widths


def compare_curve(
    task: ComparisonTask, methods: tuple[str, ...], budgets: Sequence[float], out: Path, debug: bool = False
) -> list[dict[str, Any]]:
    """One row per point, of which those that are in ``out`` already are not measured again.

    Writes ``points/*.json``, and when all are there ``curve.json`` and the plots.

    Args:
        budgets: counted bits, ascending; those of ``task`` are not used.
        debug: see ``compare``.

    Raises:
        what ``compare`` and ``points`` do, and KeyboardInterrupt; points that were finished stay.
    """
    check_report_extra()
    todo = points(task, methods, budgets)
    for bits in (budgets[0], budgets[-1]):
        check_comparison(replace(task, bits=bits), methods)
    if "bitsmoe" in methods:
        _check_reachable(task, budgets[0])
    (out / POINTS).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        for row in _measured(todo, _common(task), out, debug):
            rows.append(row)
    except KeyboardInterrupt:
        text = (
            f"interrupted; {len(rows)} of {len(todo)} points are in {out / POINTS}, the same command goes on"
        )
        raise KeyboardInterrupt(text) from None
    _write(out, task, rows)
    return rows


def _measured(
    todo: Sequence[Point], common: dict[str, Any], out: Path, debug: bool
) -> Iterator[dict[str, Any]]:
    """The row of each point, kept or new."""
    for number, point in enumerate(todo, 1):
        path, made = out / POINTS / f"{point.name}.json", {**common, "task": _options_of(point)}
        row = _kept(path, made)
        state = "is there" if row is not None else "..."
        print(f"[{number}/{len(todo)}] {point.name} {state}", file=sys.stderr, flush=True)
        if row is None:
            row = in_process(point.method, point.task, debug)
            replace_file(path, json.dumps({"row": row, "made_with": made}, indent=2).encode())
        yield row


def _options_of(point: Point) -> dict[str, Any]:
    """Without those that are of other methods, which this point does not depend on."""
    others = {name for name, methods in OPTIONS_OF.items() if point.method not in methods}
    return {name: value for name, value in asdict(point.task).items() if name not in others}


def _check_reachable(task: ComparisonTask, bits: float) -> None:
    """Refuse a range that begins below what can be stored, before anything is measured."""
    from bitsmoe_plugin.commands.estimate import estimate

    estimate(task.source.directory(), replace(task, bits=bits).config())


def _kept(path: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a point that was measured with the same, None if there is none."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # of another program, or damaged: it is measured and written anew
        return None
    if not isinstance(found, dict) or found.get("made_with") != json.loads(json.dumps(made)):
        return None
    row: dict[str, Any] | None = found.get("row")
    return row


def _common(task: ComparisonTask) -> dict[str, Any]:
    """What all points depend on besides their options."""
    files = [Path(task.dataset), Path(task.eval), *_model_files(task.source.directory())]
    if task.tasks:
        files += [path for path in sorted(bundled_tasks.FOLDER.iterdir()) if path.is_file()]
    if task.checkpoint is not None:
        files += _model_files(Path(task.checkpoint))
    return {
        "code": _digest(source_files()),
        "libraries": {"python": platform.python_version(), **dict(_versions())},
        "files": _digest(files),
    }


def _model_files(directory: Path) -> list[Path]:
    """Weights, config and tokenizer, also where the hub's cache links to them."""
    return sorted(path for path in Path(directory).iterdir() if path.is_file() and path.name != "README.md")


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 over names and contents."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while part := file.read(_AT_ONCE):
                whole.update(part)
    return whole.hexdigest()


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not there"


def _write(out: Path, task: ComparisonTask, rows: list[dict[str, Any]]) -> None:
    from bitsmoe_plugin.commands.compare.curve_plot import plots

    record = {"calibration_tokens": task.calibration_tokens, "evaluation_tokens": task.max_tokens}
    replace_file(out / RESULT, json.dumps({**record, "results": rows}, indent=2).encode())
    for name, content in plots(rows):
        replace_file(out / name, content)
