"""Commands of the command line, their options and what ``--help`` says, for readers who know no paper."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.argument_types import count, positive
from bitsmoe_plugin.commands.bench.parsers import BENCHMARKS
from bitsmoe_plugin.commands.compare import METHODS as COMPARED
from bitsmoe_plugin.commands.compare.budget_range import budgets
from bitsmoe_plugin.commands.defaults import BLOCK, PROMPT, TOKENS, WRITTEN, WRITTEN_AT_ONCE
from bitsmoe_plugin.commands.source_options import add_chat_template, add_source
from bitsmoe_plugin.options import OPTIONS
from bitsmoe_plugin.pipeline.tuning_settings import LEARNABLE, THROUGH, TuningSettings

Run = Callable[..., None]
_COUNT = count()
_DESCRIPTIONS = {
    "estimate": """\
Tell the size of the packed model, the memory and the time that quantizing
takes, and the smallest budget that is possible. Only config.json and headers
are read: this takes seconds.
""",
    "quantize": """\
Quantize the experts of a model layer by layer and save it packed, with its
tokenizer and a model card. The packed model loads with from_pretrained of
transformers and with `vllm serve`.

Finished layers are kept in OUT.work until all is done: after Ctrl-C (once:
stops after the layer, twice: at once), a crash or a reboot, the same command
continues there, with the same result.
""",
    "tune": """\
Move the scales of a packed model's bases and rows, and if asked norms and
routers, such that its predictions come closer to the original's, on
calibration text. Size and speed stay.

First layer by layer, with the experts of one layer of both models in memory,
then through the whole model if there is memory for both (--through). Finished
layers, and every minute the steps through the whole model, are kept in
OUT.work: after Ctrl-C, a crash or a reboot the same command continues there,
with the same result.
""",
    "write": """\
Let the full-precision model write calibration text itself, for `quantize` and
`tune`: it goes on from short pieces of the text that there is. Where that is
scarce, tuning on it alone learns it by heart. What is finished is kept in
OUT.work, and the same command goes on there.
""",
    "inspect": """\
Count what a packed model stores for its experts, and show for each layer how
wide its rows are, how large the error of its output is, and which experts
were kept as they were.
""",
    "report": """\
Write one self-contained HTML page, and its plots as PNG: where the bits
went, errors of the layers, calibration tokens of the experts, size by part,
and what was measured with `evaluate` or `compare`.
""",
    "evaluate": """\
Measure a model, packed by this program, packed by GPTQ or not quantized: on
text (--dataset: perplexity, lower is better), on tasks of lm-eval (--tasks),
or both.
""",
    "compare": """\
Quantize a model with several methods, each in a process of its own, and show
size and quality side by side. Everything is thrown away afterwards;
`quantize` saves a model.
""",
    "dequantize": """\
Write the dense model that a packed one stands for, for programs that know
nothing of packed ones. It is as large as before it was quantized and computes
what the packed one does, up to rounding. Weights are written layer by layer.
""",
    "import-upstream": """\
Convert a model that the authors of BitsMoE released
(zjiayu064/...-BitsMoE-2bit) to one that loads in transformers and vLLM,
without loss.
""",
    "env": """\
Print what decides how fast this installation is, for bug reports: where the
package was found, which compiled kernels run, how many threads may be busy,
and versions.
""",
    "doctor": """\
Check versions, packages that do not fit torch, compiled code, and that vLLM's
build for CPUs is found by the name that vLLM looks for (--fix sees to that).
""",
}
_MODEL = "the model: a directory, or its name on the hub"
_PACKED = "directory that `quantize` wrote"
_OUT = "directory to write; must not exist, or be empty"
_WHOLE = ("dense_bits", "size", "fit", "fit_context", "fit_batch")
"""Options about more than the experts."""
_TASKS = (
    "tasks of lm-eval: arc_easy,hellaswag; or last_word, which comes with this package: the last words of "
    "799 sentences of old books"
)
_JSON = "print JSON instead of tables"


def _add_command(commands: Any, run: Run, name: str, summary: str, example: str) -> Any:
    """A parser with a summary for the list of commands, and a description and an example of its own."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=_DESCRIPTIONS[name],
        epilog=f"example:\n  %(prog)s {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_number(
    parser: Any, flag: str, help: str, default: Any = None, kind: Callable[[str], Any] = _COUNT
) -> None:
    text = help if default is None else f"{help} (default: %(default)s)"
    parser.add_argument(flag, type=kind, default=default, metavar="N", help=text)


def _add_path(parser: Any, flag: str, help: str, metavar: str = "FILE") -> None:
    parser.add_argument(flag, type=Path, metavar=metavar, help=help)


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help=_JSON)


def _add_options(parser: Any, *names: str, **defaults: Any) -> None:
    """Flags of options of BitsMoEConfig, by its table; ``defaults`` replace those of it."""
    for name in names:
        row = OPTIONS[name]
        default = defaults.get(name, row.default)
        text = row.help if default is None else f"{row.help} (default: %(default)s)"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=_kind(row.annotation), default=default, metavar=row.flag, help=text)


def _kind(annotation: str) -> type:
    """What the text of a flag is converted to."""
    return {"int": int, "float": float}.get(annotation.removesuffix(" | None"), str)


def _add_calibration(parser: Any, **defaults: Any) -> None:
    parser.add_argument(
        "--dataset", required=True, metavar=OPTIONS["dataset"].flag, help=OPTIONS["dataset"].help
    )
    add_chat_template(parser)
    _add_options(parser, "calibration_tokens", "sequence_length", "batch_size", "seed", **defaults)


def _add_method(parser: Any) -> None:
    _add_options(parser, "method")
    others = ", ".join(name for name, row in OPTIONS.items() if not (row.flag or row.manifest))
    text = (
        "another option of BitsMoEConfig; may be repeated: --option basis_bits=8 --option widths=[0,2,3,4]. "
        f"There are {others}; `python -m pydoc bitsmoe_plugin.BitsMoEConfig` explains them all"
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=text)


def add_allow_slow(parser: Any) -> None:
    """``--allow-slow``, of every command that quantizes."""
    parser.add_argument("--allow-slow", action="store_true", help=OPTIONS["allow_slow"].help)


def add_estimate(commands: Any, run: Run) -> None:
    parser = _add_command(
        commands,
        run,
        "estimate",
        "how large, how much memory, how long: before quantizing",
        "Qwen3-30B-A3B --bits 2.0",
    )
    text = "directory of the model; without its weights, their .index.json is enough"
    parser.add_argument("model", type=Path, help=text)
    _add_options(parser, "bits", "factor_bits", *_WHOLE, "calibration_tokens", "tune", "tune_through")
    _add_method(parser)
    _add_json(parser)


def add_quantize(commands: Any, run: Run) -> None:
    parser = _add_command(
        commands,
        run,
        "quantize",
        "quantize a model and save it packed; may be interrupted",
        "Qwen3-30B-A3B out/qwen3-2bit --bits 2.0 --dataset calibration.jsonl",
    )
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("out", type=Path, help=_OUT)
    _add_options(parser, "bits", "factor_bits", *_WHOLE)
    _add_calibration(parser)
    _add_options(parser, "tune", "tune_through")
    _add_method(parser)
    _add_device(parser, "; with several processes each takes its own GPU")
    add_allow_slow(parser)
    parser.add_argument("--allow-thin", action="store_true", help=OPTIONS["allow_thin"].help)
    text = "afterwards measure the perplexity of the packed model on this text, and tell it in the model card"
    parser.add_argument("--eval", metavar="FILE", help=text)
    text = "also write OUT/report/report.html, see `bitsmoe report`"
    parser.add_argument("--report", action="store_true", help=text)
    add_source(parser)


def add_tune(commands: Any, run: Run) -> None:
    summary = "bring a packed model closer to the original, at the same size (or: quantize --tune)"
    example = "out/qwen3-2bit out/qwen3-2bit-tuned --reference Qwen3-30B-A3B --dataset calibration.jsonl"
    parser = _add_command(commands, run, "tune", summary, example)
    defaults = TuningSettings()
    parser.add_argument("model", help=_PACKED)
    parser.add_argument("out", type=Path, help=_OUT)
    parser.add_argument("--reference", required=True, metavar="MODEL", help="what it was quantized from")
    _add_calibration(parser, batch_size=defaults.batch_size, calibration_tokens=TOKENS)
    _add_number(parser, "--epochs", "how often all of the text is seen", defaults.epochs)
    text = f"of {', '.join(LEARNABLE)}, what may move (default: {','.join(defaults.learn)})"
    parser.add_argument("--learn", type=_names, default=defaults.learn, metavar="NAMES", help=text)
    text = "largest relative change of a scale per step, about"
    _add_number(parser, "--learning-rate", text, defaults.learning_rate, float)
    text = (
        "layers: one by one; model: through the whole model, in memory with the original; both; auto: both "
        "if there is memory for it, or else layers (default: %(default)s)"
    )
    parser.add_argument("--through", choices=THROUGH, default=defaults.through, help=text)
    text = "decoder layers that are tuned together where they are tuned one by one"
    _add_number(parser, "--layers-at-once", text, defaults.layers_at_once)
    text = "share of the text that is only measured on, to take the best epoch"
    _add_number(parser, "--held-out", text, defaults.held_out, float)
    _add_device(parser)
    add_source(parser, reference=True, model=False)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def add_write(commands: Any, run: Run) -> None:
    summary = "let a model write more calibration text, where there is little"
    example = "Qwen3-30B-A3B own.jsonl --dataset calibration.jsonl --tokens 500000"
    parser = _add_command(commands, run, "write", summary, example)
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("out", type=Path, help=".jsonl file to write; must not exist")
    text = "text that it goes on from: .txt, or .jsonl with a field text"
    parser.add_argument("--dataset", required=True, metavar="FILE", help=text)
    text = "to write at most, in whole sequences, prompts included"
    parser.add_argument("--tokens", type=_COUNT, required=True, metavar="N", help=text)
    _add_number(parser, "--sequence-length", "tokens per sequence", WRITTEN)
    _add_number(parser, "--prompt-tokens", "of them that come from the dataset", PROMPT)
    _add_number(parser, "--batch-size", "sequences at once", WRITTEN_AT_ONCE)
    _add_number(parser, "--temperature", "below 1: more of what is likely", 1.0, positive)
    _add_number(parser, "--seed", "of the prompts and what follows", 0, count(0))
    _add_device(parser)
    add_source(parser)


def add_inspect(commands: Any, run: Run) -> None:
    summary = "where the bits of a packed model went"
    parser = _add_command(commands, run, "inspect", summary, "out/qwen3-2bit")
    parser.add_argument("model", type=Path, help=_PACKED)
    _add_json(parser)


def add_report(commands: Any, run: Run) -> None:
    summary = "the same and more as one HTML page, with plots"
    parser = _add_command(commands, run, "report", summary, "out/qwen3-2bit --evaluation evaluation.json")
    parser.add_argument("model", type=Path, help=_PACKED)
    _add_path(parser, "--out", "directory to write to (default: report in the model)", "DIR")
    text = "what `bitsmoe evaluate --json` or `bitsmoe compare --json` printed, to show on the page"
    _add_path(parser, "--evaluation", text)


def add_evaluate(commands: Any, run: Run) -> None:
    parser = _add_command(
        commands,
        run,
        "evaluate",
        "perplexity, distance from the original, and tasks of a model",
        "out/qwen3-2bit --dataset eval.jsonl --reference Qwen3-30B-A3B --card",
    )
    parser.add_argument("model", help=_MODEL)
    _add_evaluation_text(parser, "--dataset", required=False)
    add_chat_template(parser)
    text = (
        "the model before it was quantized: also tell how far the predictions moved (KL divergence) and how "
        "often the most likely token is the same; both models are in memory"
    )
    parser.add_argument("--reference", metavar="MODEL", help=text)
    _add_number(parser, "--batch-size", "sequences at once", 8)
    _add_number(parser, "--sequence-length", "tokens per block of the text", BLOCK)
    text = "overlapping blocks: each begins N tokens after the last and scores only what is new"
    _add_number(parser, "--stride", text)
    parser.add_argument("--tasks", metavar="NAMES", help=_TASKS)
    _add_path(parser, "--task-dir", "directory of further tasks, as .yaml files of lm-eval", "DIR")
    _add_number(parser, "--few-shot", "examples in each prompt; default: as the task says", kind=count(0))
    _add_number(parser, "--limit", "only the first N examples of each task")
    _add_device(parser)
    text = "also write the results into the model card, README.md of the packed model"
    parser.add_argument("--card", action="store_true", help=text)
    add_source(parser, reference=True)
    _add_json(parser)


def _add_device(parser: Any, more: str = "") -> None:
    text = f"auto (a GPU if there is one), cpu, cuda or cuda:N{more} (default: %(default)s)"
    parser.add_argument("--device", default="auto", help=text)


def _add_evaluation_text(parser: Any, flag: str, required: bool = True) -> None:
    text = (
        "text that calibration does not see: .txt, or .jsonl with a field text (and domain, to split results)"
    )
    parser.add_argument(flag, required=required, metavar="FILE", help=text)
    _add_number(parser, "--max-tokens", "use at most N tokens of it")


def add_compare(commands: Any, run: Run) -> None:
    parser = _add_command(
        commands,
        run,
        "compare",
        "quantize with several methods and compare",
        "Qwen3-30B-A3B --dataset calibration.jsonl --eval eval.jsonl --methods full,rtn,bitsmoe",
    )
    parser.add_argument("model", help=_MODEL)
    row = OPTIONS["bits"]
    text = f"{row.help}; or FIRST:LAST:STEP, as 1.2:4:0.2, for a curve (default: %(default)s)"
    parser.add_argument("--bits", type=budgets, default=row.default, metavar=row.flag, help=text)
    text = "where points and plots of a curve are kept; the same command goes on there (default: curve)"
    _add_path(parser, "--out", text, "DIR")
    _add_options(parser, "factor_bits", "dense_bits", "size", "tune", "tune_through")
    _add_calibration(parser, calibration_tokens=TOKENS)
    _add_evaluation_text(parser, "--eval")
    text = f"of {', '.join(COMPARED)} (default: %(default)s); full: not quantized, rtn: rounded to nearest"
    parser.add_argument("--methods", default="full,rtn,bitsmoe", metavar="NAMES", help=text)
    _add_number(parser, "--group-size", "weights that share a scale, for rtn, gptq and autoround", 64)
    _add_number(parser, "--autoround-steps", "that autoround takes for each decoder layer", 200)
    text = "for the method checkpoint: a GPTQ or packed model that is there"
    parser.add_argument("--checkpoint", metavar="DIR", help=text)
    parser.add_argument("--tasks", metavar="NAMES", help=_TASKS)
    parser.add_argument("--prompt", metavar="TEXT", help="also let each of them continue this text")
    _add_number(parser, "--new-tokens", "length of the continuation", 40)
    add_allow_slow(parser)
    add_source(parser)
    _add_json(parser)


def add_dequantize(commands: Any, run: Run) -> None:
    summary = "write a packed model as a dense one that every program reads"
    parser = _add_command(commands, run, "dequantize", summary, "out/qwen3-2bit out/qwen3-dense")
    parser.add_argument("model", type=Path, help=_PACKED)
    parser.add_argument("out", type=Path, help=_OUT)
    text = "of the weights: bfloat16, float16 or float32 (default: that of the model)"
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), metavar="DTYPE", help=text)


def add_import(commands: Any, run: Run) -> None:
    summary = "convert a model that the authors of the method released"
    example = "Qwen3-30B-A3B-Base-BitsMoE-2bit out/theirs"
    parser = _add_command(commands, run, "import-upstream", summary, example)
    parser.add_argument("model", type=Path, help="directory of their model, safetensors files")
    parser.add_argument("out", type=Path, help=_OUT)


def add_debug(parser: argparse.ArgumentParser, default: Any = False) -> None:
    """``--debug``, before and behind the name of every command; and ``command``, the name."""
    text = "show where an error comes from"
    parser.add_argument("--debug", action="store_true", default=default, help=text)
    parser.set_defaults(command=parser.prog.rpartition("bitsmoe")[2].strip())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                add_debug(command, argparse.SUPPRESS)


def add_doctor(commands: Any, run: Run) -> None:
    summary = "what is wrong with the installation, and what to do"
    parser = _add_command(commands, run, "doctor", summary, "--fix")
    parser.add_argument("--fix", action="store_true", help="do what a program can do about it")


def add_env(commands: Any, run: Run) -> None:
    summary = "where the package is, its kernels, threads and versions"
    parser = _add_command(commands, run, "env", summary, "--json")
    _add_json(parser)


def add_bench(commands: Any) -> None:
    text = "speed and memory on this machine"
    parser = commands.add_parser("bench", help=text, description=f"Measure {text}.")
    names = parser.add_subparsers(required=True, metavar="NAME")
    for add in BENCHMARKS:
        add(names)
