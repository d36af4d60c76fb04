"""BitsMoE against GPTQ, on the same text and at the same counted bits.

    python examples/compare_with_gptq.py                            # quantizes with both (needs gptqmodel)
    python examples/compare_with_gptq.py --checkpoint GPTQ_DIR      # a GPTQ checkpoint that you have

GPTQ has whole widths and stores a scale and a zero point per group, so a "2-bit" checkpoint takes 2.2 to 2.5
bits per weight. BitsMoE is therefore given what the GPTQ checkpoint really takes. GPTQ is gptqmodel's
(`make install-gptq`), calibrated on the same tokens; checkpoints of AutoGPTQ and GPTQModel are read, with
experts in 2, 3, 4 or 8 bits. Group indices, which a loader does not need, are not counted against GPTQ.

The same with more options: `bitsmoe compare --help`.
"""

import argparse
import sys
from pathlib import Path

from bitsmoe_plugin.commands.compare.compare import compare, print_comparison
from bitsmoe_plugin.commands.compare.task import ComparisonTask


def main() -> None:
    """Print the table: full precision, GPTQ, BitsMoE."""
    parser = argparse.ArgumentParser(description="BitsMoE against GPTQ at the same counted bits.")
    parser.add_argument("--model", default="examples/moe-tiny", help="directory of the unquantized model")
    parser.add_argument("--checkpoint", type=Path, help="GPTQ checkpoint of this model")
    parser.add_argument("--dataset", default="examples/data/calibration.jsonl")
    parser.add_argument("--eval", default="examples/data/eval.jsonl")
    parser.add_argument("--bits", type=int, default=2, help="of GPTQ, if there is no checkpoint")
    parser.add_argument("--group-size", type=int, default=64, help="of GPTQ, if there is no checkpoint")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    args = parser.parse_args()

    def run(methods: tuple[str, ...], bits: float, checkpoint: Path | None = None) -> list[dict]:
        """One row per method, each computed in a process of its own."""
        task = ComparisonTask(
            model=args.model,
            bits=bits,
            factor_bits=None,
            dataset=args.dataset,
            eval=args.eval,
            calibration_tokens=args.calibration_tokens,
            sequence_length=512,
            batch_size=8,
            seed=0,
            max_tokens=args.eval_tokens,
            group_size=args.group_size,
            prompt=None,
            new_tokens=0,
            checkpoint=checkpoint and str(checkpoint),
        )
        return compare(task, methods)

    rows = run(("full", "checkpoint" if args.checkpoint else "gptq"), args.bits, args.checkpoint)
    counted = rows[1]["bits_per_weight"]
    print_comparison(rows + run(("bitsmoe",), counted), sys.stdout)


if __name__ == "__main__":
    main()
