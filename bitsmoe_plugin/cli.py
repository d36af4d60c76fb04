"""Command line: ``bitsmoe estimate | quantize | tune | write | inspect | report | evaluate | compare |
dequantize | import-upstream | bench | env | doctor``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bitsmoe_plugin.base.error_lines import told
from bitsmoe_plugin.base.stdout import stdout_to_stderr
from bitsmoe_plugin.base.tested_versions import check_companions, describe_versions
from bitsmoe_plugin.commands import parsers
from bitsmoe_plugin.commands.source_options import OWN, source_of
from bitsmoe_plugin.errors import BitsMoEError, ConfigError, VersionError
from bitsmoe_plugin.options import OPTIONS

if TYPE_CHECKING:
    from bitsmoe_plugin.config import BitsMoEConfig

_FLAGS = tuple(name for name, option in OPTIONS.items() if option.flag)
"""Options of BitsMoEConfig that have a flag of their own; ``--option`` leaves them to it."""
SWITCHES = ("allow_slow", "allow_thin")
"""Options that a switch turns on."""
_SESSION = """\
a first session:
  %(prog)s estimate MODEL
  %(prog)s quantize MODEL OUT --dataset calibration.jsonl
  %(prog)s evaluate OUT --dataset eval.jsonl --reference MODEL
  vllm serve OUT

`%(prog)s COMMAND --help` explains a command.
"""


def build_parser(program: str = "bitsmoe") -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        program: what users type before a command.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Store the experts of a Mixture-of-Experts language model in about 2 bits\n"
        "per weight, and see what that did to it.",
        epilog=_SESSION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=describe_versions())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    parsers.add_estimate(commands, _estimate)
    parsers.add_quantize(commands, _quantize)
    parsers.add_tune(commands, _tune)
    parsers.add_write(commands, _write)
    parsers.add_inspect(commands, _inspect)
    parsers.add_report(commands, _report)
    parsers.add_evaluate(commands, _evaluate)
    parsers.add_compare(commands, _compare)
    parsers.add_dequantize(commands, _dequantize)
    parsers.add_import(commands, _import)
    parsers.add_bench(commands)
    parsers.add_env(commands, _env)
    parsers.add_doctor(commands, _doctor)
    parsers.add_debug(parser)
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
    from bitsmoe_plugin.config import BitsMoEConfig

    given = {name: getattr(args, name) for name in _FLAGS if hasattr(args, name)}
    given |= {name: True for name in SWITCHES if getattr(args, name, False)}
    return BitsMoEConfig(**{**given, **parse_options(args.option)})


def _estimate(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.commands.estimate import estimate, print_estimate

    result = estimate(args.model, _config(args))
    if args.json:
        _print_json(asdict(result), stdout)
    else:
        print_estimate(result, stdout)


def _quantize(args: argparse.Namespace, stdout: TextIO) -> None:
    from transformers.utils import logging

    from bitsmoe_plugin.base.devices import choose_device
    from bitsmoe_plugin.base.spans import recorded
    from bitsmoe_plugin.base.workers import connected
    from bitsmoe_plugin.commands.estimate_resources import KERNELS
    from bitsmoe_plugin.commands.quantize import quantize_to_directory
    from bitsmoe_plugin.commands.times import told_times, write_times

    if args.report:  # what is missing should not show after hours
        from bitsmoe_plugin.commands.report import check_report_extra

        check_report_extra()
    if args.eval is not None:
        _check_evaluation_text(args)
    device = choose_device(args.device)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))  # read at the first product
    seconds: dict[str, float] = {}
    with connected() as workers, recorded(seconds, device):
        if not workers.main:
            logging.disable_progress_bar()
        quantize_to_directory(source_of(args), args.out, _config(args), device)
        main = workers.main
    if main:
        _report_size(args.out)
        write_times(args.out, seconds)
        print(told_times(seconds), file=sys.stderr)
        evaluation = _evaluate_packed(args, device) if args.eval is not None else None
        if args.report:
            _write_report(args.out, evaluation)


def _check_evaluation_text(args: argparse.Namespace) -> None:
    """Read text that is needed at the end, with the tokenizer that will be saved."""
    from bitsmoe_plugin.commands.evaluate import BLOCK, evaluation_text
    from bitsmoe_plugin.models.tokenizer import load_tokenizer

    options = {"chat_template_kwargs": args.chat_template_kwargs}
    tokenizer = load_tokenizer(source_of(args))
    evaluation_text(args.eval, tokenizer, sequence_length=BLOCK, max_tokens=None, **options)


def _evaluate_packed(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure a model that was just written, and tell its card."""
    from bitsmoe_plugin.commands.evaluate import as_record, evaluate_path
    from bitsmoe_plugin.commands.model_card import record_evaluation
    from bitsmoe_plugin.models.model_source import ModelSource

    packed = ModelSource.of(args.out, trust_remote_code=args.trust_remote_code)
    options = {"chat_template_kwargs": args.chat_template_kwargs}
    result = as_record(evaluate_path(packed, args.eval, device, **options), args.eval)
    record_evaluation(args.out, result)
    print(f"perplexity: {result['perplexity']:.3f}, written into {args.out / 'README.md'}", file=sys.stderr)
    return result


def _write_report(directory: Path, evaluation: dict[str, Any] | None) -> None:
    from bitsmoe_plugin.commands.report import FOLDER, write_report

    path = None
    if evaluation is not None:
        path = directory / FOLDER / "evaluation.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(evaluation, indent=2), encoding="utf-8")
    print(f"report: {write_report(directory, evaluation=path)}", file=sys.stderr)


def _tune(args: argparse.Namespace, stdout: TextIO) -> None:
    from dataclasses import fields

    from bitsmoe_plugin.base.devices import choose_device
    from bitsmoe_plugin.commands.tune import tune_to_directory
    from bitsmoe_plugin.models.model_source import ModelSource
    from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings

    names = [field.name for field in fields(TuningSettings)]
    result = tune_to_directory(
        ModelSource.of(args.model, trust_remote_code=args.trust_remote_code),
        source_of(args, "reference"),
        args.out,
        args.dataset,
        TuningSettings(**{name: getattr(args, name) for name in names}),
        calibration_tokens=args.calibration_tokens,
        sequence_length=args.sequence_length,
        device=choose_device(args.device),
        chat_template_kwargs=args.chat_template_kwargs,
    )
    print(
        f"{args.out}: KL to {args.reference} on held-out text {result.before:.4f} before, {result.after:.4f} "
        f"after epoch {result.epoch}",
        file=sys.stderr,
    )


def _write(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.base.devices import choose_device
    from bitsmoe_plugin.base.workers import connected
    from bitsmoe_plugin.commands.write_text import write_text

    names = ("sequence_length", "prompt_tokens", "batch_size", "temperature", "seed")
    options = {name: getattr(args, name) for name in names}
    device = choose_device(args.device)
    with connected():  # it refuses several processes
        count = write_text(source_of(args), args.out, args.dataset, args.tokens, device=device, **options)
    print(f"{args.out}: {count:,} sequences of {args.sequence_length:,} tokens", file=sys.stderr)


def _dequantize(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.integrations.dequantize_checkpoint import dequantize_checkpoint

    dequantize_checkpoint(args.model, args.out, args.dtype)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: dense, {size:,} bytes", file=sys.stderr)


def _doctor(args: argparse.Namespace, stdout: TextIO) -> None:
    raise ConfigError(
        "run `bitsmoe doctor`; that program answers it itself, also where this package cannot be imported"
    )


def _env(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.commands.environment import environment, print_environment

    found = environment()
    if args.json:
        _print_json(found, stdout)
    else:
        print_environment(found, stdout)


def _import(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.commands.import_upstream.convert import import_upstream

    import_upstream(args.model, args.out)
    _report_size(args.out)


def _report_size(out: Path) -> None:
    from bitsmoe_plugin.checkpoint.prediction_layers import PredictionSize
    from bitsmoe_plugin.commands.inspect import inspect_checkpoint

    size = inspect_checkpoint(out)
    besides = PredictionSize(**size["prediction"]).describe()
    text = f"{out}: {size['bits_per_weight']:.4f} bits per expert weight"
    print(text + (f"; besides: {besides}" if besides else ""), file=sys.stderr)


def _inspect(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.commands.inspect import inspect_checkpoint, print_inspection

    report = inspect_checkpoint(args.model)
    if args.json:
        _print_json(report, stdout)
    else:
        print_inspection(report, stdout)


def _report(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.commands.report import write_report

    print(write_report(args.model, args.out, args.evaluation), file=stdout)


def _evaluate(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.base.devices import choose_device
    from bitsmoe_plugin.checkpoint.read import check_if_packed, read_config
    from bitsmoe_plugin.commands.evaluate import load_for_evaluation
    from bitsmoe_plugin.commands.evaluate_output import print_evaluation
    from bitsmoe_plugin.models.model_class import check_loadable
    from bitsmoe_plugin.models.tokenizer import load_tokenizer

    _check_evaluate(args)
    source = source_of(args)
    check_if_packed(source.name)
    source.config()
    if args.reference:
        check_loadable(source_of(args, "reference"))
    if args.card:
        read_config(Path(source.name))  # only a packed model has a card of ours
    if args.tasks:
        from bitsmoe_plugin.commands.evaluate_tasks import find_tasks

        find_tasks(args.tasks.split(","), args.task_dir)  # a wrong name should not cost a load
    device, tokenizer = choose_device(args.device), load_tokenizer(source)
    result: dict[str, Any] = {}
    model = load_for_evaluation(source, device)
    if args.dataset:
        result.update(_evaluate_text(args, model, tokenizer))
    if args.tasks:
        from bitsmoe_plugin.commands.evaluate_tasks import evaluate_tasks

        result["tasks"] = evaluate_tasks(
            model,
            tokenizer,
            args.tasks.split(","),
            task_dir=args.task_dir,
            few_shot=args.few_shot,
            limit=args.limit,
            batch_size=args.batch_size,
        )
    if args.card:
        from bitsmoe_plugin.commands.model_card import record_evaluation

        record_evaluation(Path(source.name), result)
    if args.json:
        _print_json(result, stdout)
    else:
        print_evaluation(result, stdout)


def _check_evaluate(args: argparse.Namespace) -> None:
    """Refuse options without what they belong to, and text that cannot be read."""
    from bitsmoe_plugin.base.option_checks import check_number
    from bitsmoe_plugin.calibration.text import load_documents
    from bitsmoe_plugin.commands.evaluate import check_evaluation

    if not args.dataset and not args.tasks:
        raise ConfigError("give --dataset TEXT for perplexity, --tasks NAMES for tasks of lm-eval, or both")
    needs = {
        "--dataset": ("reference", "stride", "max_tokens", "chat_template_kwargs"),
        "--tasks": ("task_dir", "few_shot", "limit"),
    }
    for owner, names in needs.items():
        for name in names:
            if getattr(args, name) is not None and not getattr(args, owner[2:]):
                raise ConfigError(f"--{name.replace('_', '-')} belongs to {owner}, which is not given")
    given = [name for name in OWN if getattr(args, f"reference_{name}")]
    if given and not args.reference:
        raise ConfigError(f"--reference-{given[0]} belongs to --reference, which is not given")
    check_evaluation(args.sequence_length, args.max_tokens, args.stride, args.batch_size)
    for name, least in (("few_shot", 0), ("limit", 1)):
        if getattr(args, name) is not None:
            check_number(name, getattr(args, name), least, 10**9, whole=True, owner="lm-eval")
    if args.dataset:
        load_documents(args.dataset)


def _evaluate_text(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    from bitsmoe_plugin.commands.evaluate import as_record, evaluate_text

    reference = source_of(args, "reference") if args.reference else None
    options = {name: getattr(args, name) for name in ("sequence_length", "stride")}
    result = evaluate_text(
        model,
        tokenizer,
        args.dataset,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        reference=reference,
        chat_template_kwargs=args.chat_template_kwargs,
        **options,
    )
    return as_record(result, args.dataset, reference=reference.name if reference else None, **options)


def _compare(args: argparse.Namespace, stdout: TextIO) -> None:
    from bitsmoe_plugin.commands.compare.compare import compare, print_comparison
    from bitsmoe_plugin.commands.compare.task import ComparisonTask

    curve, methods = isinstance(args.bits, tuple), tuple(args.methods.split(","))
    if args.out is not None and not curve:
        raise ConfigError("--out is for curves, --bits FIRST:LAST:STEP; one budget is printed and not kept")
    task = ComparisonTask(
        model=args.model,
        bits=args.bits[0] if curve else args.bits,
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
        dense_bits=args.dense_bits,
        size=args.size,
        tune=args.tune,
        tune_through=args.tune_through,
        autoround_steps=args.autoround_steps,
        chat_template_kwargs=args.chat_template_kwargs,
        allow_slow=args.allow_slow,
        loading={name: getattr(args, name) for name in (*OWN, "cache_dir", "trust_remote_code")},
        tasks=args.tasks.split(",") if args.tasks else [],
    )
    if curve:
        from bitsmoe_plugin.commands.compare.curve import compare_curve

        out = Path("curve") if args.out is None else args.out
        results = compare_curve(task, methods, args.bits, out, debug=args.debug)
    else:
        results = compare(task, methods, debug=args.debug)
    if args.json:
        _print_json({"results": results}, stdout)
    else:
        print_comparison(results, stdout)


def main(argv: Sequence[str] | None = None, program: str = "bitsmoe") -> int:
    """Run a command; returns the exit status.

    It is 2 for errors that are found by this package, 1 for those of libraries below, 130 for Ctrl-C. Only
    the JSON of ``--json`` or the tables go to stdout; progress, logs and errors to stderr.

    Args:
        argv: arguments after the program's name; those of the process if None.
        program: what users typed before them.
    """
    return run(build_parser(program).parse_args(argv), program)


def run(args: argparse.Namespace, program: str = "bitsmoe") -> int:
    """Run a command whose arguments ``build_parser`` has parsed; returns what ``main`` does."""
    try:
        _check_paths(args)
        with stdout_to_stderr() as stdout:
            args.run(args, stdout)
    except (SystemExit, GeneratorExit):
        raise
    except KeyboardInterrupt as error:
        print(f"{program}: {str(error) or 'interrupted; nothing was written'}", file=sys.stderr)
        return 130
    except BaseException as raised:  # panics of libraries in Rust are no Exception
        if args.debug:
            traceback.print_exc()
        cause = _behind(raised)
        missing = _not_here(args, cause)
        print(f"{program}: error: {missing}{told(cause, _subject(args))}", file=sys.stderr)
        return 2 if missing or isinstance(cause, BitsMoEError) else 1
    return 0


def _behind(error: BaseException) -> BaseException:
    """The error, or what is wrong with the installation, where that shows in errors like it."""
    if isinstance(error, Exception) and not isinstance(error, BitsMoEError):
        try:
            check_companions(error)
        except VersionError as cause:
            return cause
    return error


def _subject(args: argparse.Namespace) -> str:
    """The command, and the model or the like that it was given."""
    return " ".join(str(part) for part in (args.command, getattr(args, "model", "")) if part)


def _missing_models(args: argparse.Namespace) -> list[str]:
    """Models that are given by name or directory, and are no directory here."""
    return [model for model in _given_models(args) if not Path(model).exists()]


def _given_models(args: argparse.Namespace) -> list[str]:
    given = [getattr(args, name, None) for name in ("model", "reference")]
    return [model for model in given if isinstance(model, str)]


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse paths without a model that cannot be names on the hub, which is asked for them for a minute."""
    for model in _missing_models(args):
        if model.count("/") > 1 or model.startswith((".", "/", "~")):
            raise ConfigError(f"model directory {model} does not exist")
    for model in _given_models(args):
        if Path(model).exists() and not (Path(model) / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json; give the directory of a model")


def _not_here(args: argparse.Namespace, error: BaseException) -> str:
    """What transformers' errors about the hub leave out: most often the path of a directory is wrong."""
    missing = _missing_models(args)
    if not missing or not isinstance(error, OSError):
        return ""
    return f"{missing[0]} is no directory here, and loading it from the hub failed: "
