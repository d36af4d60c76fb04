"""What each element of the method is worth: quantize with one element switched at a time.

    python examples/ablation.py examples/moe-tiny --dataset examples/data/calibration.jsonl \
        --eval examples/data/eval.jsonl

prints a Markdown table; ``make ablation`` runs it on the bundled model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.commands.evaluate import EvaluationText, evaluate_model, evaluation_text


@dataclass(frozen=True)
class Variant:
    """One row of the table: what is different, and the options that say so."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("default"),
    Variant("uniform grids instead of trellis", {"grid": "uniform"}),
    Variant("separate bases for gate and up", {"joint_basis": False}),
    Variant("bases not whitened", {"whitening": False}),
    Variant("bases in 8 bits", {"basis_bits": 8}),
    Variant("bases in 16 bits", {"basis_bits": 16}),
    Variant("cost: spectral energy instead of output error", {"cost": "spectral"}),
    Variant("tokens weigh alike", {"token_weighting": "none"}),
    Variant("neurons weigh alike", {"neuron_weighting": False}),
    Variant("input covariance of the layer only", {"covariance_prior": 1e6}),
    Variant("input covariance of the expert only", {"covariance_prior": 0.0}),
    Variant("no error feedback", {"feedback": False}),
    Variant("no widening of gate and up scales", {"widening": False}),
    Variant("down not refitted", {"refit": False}),
    Variant("earlier layers' errors not made up for", {"compensation": False}),
    Variant("not sequential", {"sequential": False}),
    Variant("budget per layer", {"scope": "layer"}),
    Variant("fast", {"method": "fast"}),
    Variant("paper-v1", {"method": "paper-v1"}),
    Variant("paper-v2", {"method": "paper-v2"}),
    Variant("tuned through the whole model, two epochs", {"tune": 2}),
)


def run(args: argparse.Namespace, variant: Variant, texts: list[EvaluationText], reference: Any) -> str:
    """Quantize, evaluate, and format one row."""
    start = time.perf_counter()
    config = BitsMoEConfig(
        bits=args.bits,
        factor_bits=args.factor_bits,
        dataset=args.dataset,
        calibration_tokens=args.calibration_tokens,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        **variant.options,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=config, device_map=args.device
    )
    seconds = time.perf_counter() - start
    result = evaluate_model(model, texts, reference=reference, batch_size=args.batch_size)
    agreement = 100 * (result.top1_agreement or 0.0)
    layers = model.config.quantization_config.layers.values()
    gaps = [layer["report"]["bits_over_bound"] for layer in layers]
    over_bound = "" if None in gaps else f"{statistics.mean(gaps):.2f}"
    return (
        f"| {variant.name} | {result.perplexity:.2f} | {result.kl_divergence:.4f} | {agreement:.1f} % "
        f"| {over_bound} | {seconds:.0f} |"
    )


def main() -> None:
    """Parse options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True, help="calibration text, .txt or .jsonl")
    parser.add_argument("--eval", required=True, help="evaluation text, .txt or .jsonl")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--factor-bits", type=float)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=30_000)
    parser.add_argument("--device", help="for example cuda; default: the CPU")
    parser.add_argument("--only", help="comma list of variant numbers, from 0")
    args = parser.parse_args()
    chosen = [VARIANTS[int(i)] for i in args.only.split(",")] if args.only else list(VARIANTS)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = evaluation_text(
        args.eval, tokenizer, sequence_length=args.sequence_length, max_tokens=args.max_tokens
    )
    reference = AutoModelForCausalLM.from_pretrained(args.model, device_map=args.device).eval()
    full = evaluate_model(reference, texts, batch_size=args.batch_size)
    print("| variant | perplexity | KL | same top token | bits over bound | seconds |")
    print("|---|---|---|---|---|---|")
    print(f"| full precision | {full.perplexity:.2f} | 0 | 100 % | | |", flush=True)
    for number, variant in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {variant.name}", file=sys.stderr, flush=True)
        print(run(args, variant, texts, reference), flush=True)


if __name__ == "__main__":
    main()
