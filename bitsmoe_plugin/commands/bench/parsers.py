"""Options of the benchmarks; what measures is imported when one is run."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from bitsmoe_plugin.base.argument_types import count, counts, positive, positives
from bitsmoe_plugin.commands.defaults import SHAPES
from bitsmoe_plugin.options import OPTIONS
from bitsmoe_plugin.presets import METHODS


def _add(commands: Any, name: str, text: str) -> Any:
    """A parser for ``bench NAME`` that prints the rows which ``measure(args)`` of the module returns."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(args: argparse.Namespace, stdout: TextIO) -> None:
        from bitsmoe_plugin.commands.bench.output import print_rows

        module = import_module(f"bitsmoe_plugin.commands.bench.{name}")
        print_rows(module.measure(args), args.json, stdout)

    parser.set_defaults(run=run)
    return parser


def _add_layer(commands: Any) -> None:
    """``bench layer``."""
    parser = _add(commands, "layer", "one MoE layer, ours against dense and GPTQ")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(SHAPES), help="whose layer")
    parser.add_argument("--tokens", type=counts, default="1,4,16,64,256", help="comma list: tokens at once")
    text = "comma list of counted bits per weight of ours"
    parser.add_argument("--bits", type=positives, default="2.0,3.0", help=text)
    parser.add_argument("--device", help="cpu or cuda; default: what is there")
    parser.add_argument("--threads", type=count(), default=None, help="on a CPU; default: torch's")
    text = "timed calls of each, each with new experts"
    parser.add_argument("--repeats", type=count(), default=15, help=text)


def _add_decode(commands: Any) -> None:
    """``bench decode``."""
    parser = _add(commands, "decode", "generated tokens per second of whole models")
    parser.add_argument("models", nargs="+", help="directories, packed or not; the first is compared with")
    parser.add_argument("--engines", default=None, help="comma list of transformers, vllm; default: both")
    parser.add_argument("--batch", type=counts, default="1,16", help="comma list: sequences at once")
    parser.add_argument("--prompt-tokens", type=count(), default=16, help="per sequence, random ones")
    parser.add_argument("--new-tokens", type=count(), default=64, help="generated per sequence")
    parser.add_argument("--dtype", default="bfloat16", help="of activations and of what is not packed")


def _add_quantize(commands: Any) -> None:
    """``bench quantize``."""
    parser = _add(commands, "quantize", "quantizing one MoE layer, ours against GPTQ")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(SHAPES))
    parser.add_argument("--experts", type=count(), help="so many instead of the model's")
    text = "comma list: tokens of calibration (default: %(default)s)"
    parser.add_argument("--tokens", type=counts, default="8192,32768,131072", help=text)
    parser.add_argument("--bits", type=positive, default=2.0)
    parser.add_argument("--method", default="default", choices=sorted(METHODS))
    text = "experts that GPTQ quantizes; 0: no GPTQ"
    parser.add_argument("--gptq-experts", type=count(0), default=2, help=text)
    parser.add_argument("--threads", type=count(), default=None, help="default: torch's")
    text = "auto (a GPU if there is one), cpu or cuda, of both quantizers (default: %(default)s)"
    parser.add_argument("--device", default="auto", help=text)
    parser.add_argument("--allow-slow", action="store_true", help=OPTIONS["allow_slow"].help)


def _add_allocation(commands: Any) -> None:
    """``bench allocation``."""
    parser = _add(commands, "allocation", "global allocation of a model of full size")
    parser.add_argument("--layers", type=count(), default=48, help="MoE layers")
    parser.add_argument("--experts", type=count(), default=128, help="per layer")
    parser.add_argument("--rank", type=count(), default=2048, help="rows per factor, the model's hidden_size")
    parser.add_argument("--intermediate-size", type=count(), default=768, help="values per row")
    parser.add_argument("--bits", type=positive, default=2.0, help="counted bits per expert weight")
    parser.add_argument("--seed", type=count(0), default=0, help="of the random costs")


def _add_checkpoint(commands: Any) -> None:
    """Add ``bitsmoe bench checkpoint``."""
    text = "write a random Qwen3-MoE checkpoint (Qwen3-30B-A3B's sizes unless given) to measure with"
    parser = _add(commands, "checkpoint", text)
    parser.add_argument("directory", type=Path, help="directory to write; must not exist or be empty")
    parser.add_argument("--layers", type=count(), default=48, help="decoder layers, all with experts")
    parser.add_argument("--hidden-size", type=count(), help="of the model")
    parser.add_argument("--intermediate-size", type=count(), help="of an expert")
    parser.add_argument("--experts", type=count(), help="per layer")
    parser.add_argument("--vocab-size", type=count(), help="tokens of the vocabulary")
    parser.add_argument("--tokenizer", help="model directory whose tokenizer is copied")
    parser.add_argument("--seed", type=count(0), default=0, help="of the random weights")


BENCHMARKS = (_add_layer, _add_decode, _add_quantize, _add_allocation, _add_checkpoint)
