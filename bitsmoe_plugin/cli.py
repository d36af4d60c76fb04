"""Command line: ``bitsmoe estimate | quantize | inspect | report | evaluate | compare | import-upstream |
bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from bitsmoe_plugin.benchmarks import BENCHMARKS
from bitsmoe_plugin.comparison import METHODS as COMPARED
from bitsmoe_plugin.config import METHODS, BitsMoEConfig
from bitsmoe_plugin.errors import BitsMoEError, ConfigError
from bitsmoe_plugin.streams import stdout_to_stderr

_FLAGS = (
    "bits",
    "factor_bits",
    "dataset",
    "calibration_tokens",
    "sequence_length",
    "batch_size",
    "seed",
    "method",
)
"""Options of BitsMoEConfig that have a flag of their own; ``--option`` leaves them to it."""


def _add_budget(parser: argparse.ArgumentParser) -> None:
    bits = BitsMoEConfig().bits
    parser.add_argument("--bits", type=float, default=bits, help="counted bits per expert weight")
    parser.add_argument("--factor-bits", type=float, help="replaces --bits: the same count without the bases")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    defaults = BitsMoEConfig()
    _add_budget(parser)
    parser.add_argument("--dataset", required=True, help="calibration text, .txt or .jsonl")
    parser.add_argument("--calibration-tokens", type=int, default=defaults.calibration_tokens)
    parser.add_argument("--sequence-length", type=int, default=defaults.sequence_length)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--seed", type=int, default=defaults.seed)


def _add_quantize(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize",
        help="quantize a model and save it packed; may be interrupted",
        description="Quantize a model and save it packed. Finished layers are kept in OUT.work until all is "
        "done: after Ctrl-C (once: stops after the layer, twice: at once), a crash or a reboot, the same "
        "command continues there, with the same result.",
    )
    parser.add_argument("model", help="model directory or hub name")
    parser.add_argument("out", type=Path, help="directory to write; must not exist or be empty")
    _add_calibration(parser)
    _add_method(parser)
    parser.add_argument(
        "--report", action="store_true", help="also write OUT/report/report.html and its plots"
    )
    parser.set_defaults(run=_quantize)


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="default", help=f"one of {', '.join(METHODS)}")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of BitsMoEConfig, e.g. basis_bits=8, widths=[2,3,4], refit=false",
    )


def _add_estimate(commands: Any) -> None:
    parser = commands.add_parser("estimate", help="size, memory and time of quantizing, without doing it")
    parser.add_argument("model", type=Path, help="model directory; of the weights only an index is needed")
    _add_budget(parser)
    parser.add_argument("--calibration-tokens", type=int, default=BitsMoEConfig().calibration_tokens)
    _add_method(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_estimate)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="where the bits of a packed checkpoint went")
    parser.add_argument("model", type=Path, help="directory of a packed checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="one HTML page and plots of a packed checkpoint")
    parser.add_argument("model", type=Path, help="directory of a packed checkpoint")
    parser.add_argument("--out", type=Path, help="directory to write to; default: DIR/report")
    parser.add_argument(
        "--evaluation", type=Path, help="what `evaluate --json` or `compare --json` wrote: for the perplexity"
    )
    parser.set_defaults(run=_report)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="perplexity, divergence and tasks of a model, packed, of GPTQ or not quantized",
        description="Evaluate a model on text (--dataset), on tasks of lm-eval (--tasks), or both.",
    )
    parser.add_argument("model", help="model directory or hub name")
    _add_evaluation_options(parser, "--dataset", required=False)
    parser.add_argument("--reference", help="full-precision model: also KL divergence and top-1 agreement")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per block of the text")
    parser.add_argument(
        "--stride", type=int, help="overlapping blocks that begin this many tokens apart; each scores the new"
    )
    parser.add_argument("--tasks", help="comma list of tasks of lm-eval, e.g. arc_easy,hellaswag")
    parser.add_argument("--task-dir", type=Path, help="directory of further tasks, as .yaml files of lm-eval")
    parser.add_argument("--few-shot", type=int, help="examples in each prompt; default: as the task says")
    parser.add_argument("--limit", type=int, help="only the first examples of each task")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_evaluate)


def _add_evaluation_options(parser: argparse.ArgumentParser, name: str, required: bool = True) -> None:
    text = "evaluation text, .txt or .jsonl (field domain is used)"
    parser.add_argument(name, required=required, help=text)
    parser.add_argument("--max-tokens", type=int, default=None, help="evaluate on at most this many tokens")


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="quantize with several methods and compare")
    parser.add_argument("model", help="model directory or hub name")
    _add_calibration(parser)
    _add_evaluation_options(parser, "--eval")
    parser.add_argument("--methods", default="full,rtn,bitsmoe", help=f"comma list of {', '.join(COMPARED)}")
    parser.add_argument("--group-size", type=int, default=64, help="of round-to-nearest and GPTQ")
    parser.add_argument(
        "--checkpoint", help="directory of a GPTQ or packed checkpoint, for the method checkpoint"
    )
    parser.add_argument(
        "--prompt", default=None, help="also print a continuation of this text by each method"
    )
    parser.add_argument("--new-tokens", type=int, default=40, help="length of the continuation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_compare)


def _add_import(commands: Any) -> None:
    parser = commands.add_parser(
        "import-upstream", help="convert a checkpoint that the BitsMoE authors released, without loss"
    )
    parser.add_argument("model", type=Path, help="directory of their checkpoint, safetensors")
    parser.add_argument("out", type=Path, help="directory to write; must not exist or be empty")
    parser.set_defaults(run=_import)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="benchmarks")
    names = parser.add_subparsers(required=True, metavar="NAME")
    for add in BENCHMARKS:
        add(names)


def build_parser(program: str = "bitsmoe") -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        program: what users type before a command.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="Quantize Mixture-of-Experts language models to 2 bits."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_estimate,
        _add_quantize,
        _add_inspect,
        _add_report,
        _add_evaluate,
        _add_compare,
        _add_import,
        _add_bench,
    ):
        add(commands)
    return parser


def _print_json(value: dict[str, Any], stdout: TextIO) -> None:
    print(json.dumps(value, indent=2), file=stdout)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from ``NAME=VALUE`` texts; values are JSON, or plain text if they are none.

    Raises:
        ConfigError: a text without ``=``, or an option that has a flag of its own.
    """
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair}: write NAME=VALUE, for example basis_bits=8")
        if name in _FLAGS:
            raise ConfigError(f"--option {pair}: use --{name.replace('_', '-')}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _config(args: argparse.Namespace) -> BitsMoEConfig:
    """The options that a command's flags and ``--option`` give."""
    given = {name: getattr(args, name) for name in _FLAGS if hasattr(args, name)}
    return BitsMoEConfig(**given, **parse_options(args.option))


def _estimate(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.estimate import estimate, print_estimate

    result = estimate(args.model, _config(args))
    if args.json:
        _print_json(asdict(result), stdout)
    else:
        print_estimate(result, stdout)


def _quantize(args: argparse.Namespace, stdout: TextIO) -> None:
    from transformers.utils import logging

    from bitsmoe_plugin.integrations.transformers import quantize_to_directory
    from bitsmoe_plugin.resources import KERNELS
    from bitsmoe_plugin.workers import connected

    if args.report:
        from bitsmoe_plugin.report import check_report_extra, write_report

        check_report_extra()  # what is missing should not show after hours
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))  # read at the first product
    with connected() as workers:
        if not workers.main:
            logging.disable_progress_bar()
        quantize_to_directory(args.model, args.out, _config(args))
        if workers.main:
            _report_size(args.out)
            if args.report:
                print(f"report: {write_report(args.out)}", file=sys.stderr)


def _import(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.upstream.convert import import_upstream

    import_upstream(args.model, args.out)
    _report_size(args.out)


def _report_size(out: Path) -> None:
    from bitsmoe_plugin.inspection import inspect_checkpoint

    size = inspect_checkpoint(out)
    print(f"{out}: {size['bits_per_weight']:.4f} bits per expert weight", file=sys.stderr)


def _inspect(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.inspection import inspect_checkpoint, print_inspection

    report = inspect_checkpoint(args.model)
    if args.json:
        _print_json(report, stdout)
    else:
        print_inspection(report, stdout)


def _report(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.report import write_report

    print(write_report(args.model, args.out, args.evaluation), file=stdout)


def _evaluate(args: argparse.Namespace, stdout: TextIO) -> None:
    from transformers import AutoTokenizer

    from bitsmoe_plugin.evaluation import load_for_evaluation
    from bitsmoe_plugin.inspection import check_if_packed, print_evaluation

    _check_evaluate(args)
    check_if_packed(args.model)
    if args.tasks:
        from bitsmoe_plugin.integrations.lm_eval import find_tasks

        find_tasks(args.tasks.split(","), args.task_dir)  # a wrong name should not cost a load
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result: dict[str, Any] = {}
    model = load_for_evaluation(args.model)
    if args.dataset:
        result.update(_evaluate_text(args, model, tokenizer))
    if args.tasks:
        from bitsmoe_plugin.integrations.lm_eval import evaluate_tasks

        result["tasks"] = evaluate_tasks(
            model,
            tokenizer,
            args.tasks.split(","),
            task_dir=args.task_dir,
            few_shot=args.few_shot,
            limit=args.limit,
            batch_size=args.batch_size,
        )
    if args.json:
        _print_json(result, stdout)
    else:
        print_evaluation(result, stdout)


def _check_evaluate(args: argparse.Namespace) -> None:
    """Refuse options without what they belong to."""
    if not args.dataset and not args.tasks:
        raise ConfigError("give --dataset TEXT for perplexity, --tasks NAMES for tasks of lm-eval, or both")
    needs = {"--dataset": ("reference", "stride", "max_tokens"), "--tasks": ("task_dir", "few_shot", "limit")}
    for owner, names in needs.items():
        for name in names:
            if getattr(args, name) is not None and not getattr(args, owner[2:]):
                raise ConfigError(f"--{name.replace('_', '-')} belongs to {owner}, which is not given")


def _evaluate_text(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    from bitsmoe_plugin.evaluation import evaluate_text

    names = ("sequence_length", "max_tokens", "stride", "reference", "batch_size")
    options = {name: getattr(args, name) for name in names}
    result = asdict(evaluate_text(model, tokenizer, args.dataset, **options))
    return {key: value for key, value in result.items() if value is not None}


def _compare(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.comparison.compare import ComparisonTask, compare, print_comparison

    task = ComparisonTask(
        model=args.model,
        bits=args.bits,
        factor_bits=args.factor_bits,
        dataset=args.dataset,
        eval=args.eval,
        calibration_tokens=args.calibration_tokens,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        seed=args.seed,
        max_tokens=args.max_tokens,
        group_size=args.group_size,
        prompt=args.prompt,
        new_tokens=args.new_tokens,
        checkpoint=args.checkpoint,
    )
    results = compare(task, tuple(args.methods.split(",")))
    if args.json:
        _print_json({"results": results}, stdout)
    else:
        print_comparison(results, stdout)


def main(argv: Sequence[str] | None = None, program: str = "bitsmoe") -> int:
    """Run a command; returns the exit status (2 for errors that the user can mend).

    Only the JSON of ``--json`` or the tables go to stdout; progress, logs and errors to stderr.

    Args:
        argv: arguments after the program's name; those of the process if None.
        program: what users typed before them.
    """
    args = build_parser(program).parse_args(argv)
    try:
        with stdout_to_stderr() as stdout:
            args.run(args, stdout)
    except (BitsMoEError, OSError) as error:  # OSError: transformers on a path without a model
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{program}: {error or 'interrupted; nothing was written'}", file=sys.stderr)
        return 130
    return 0
