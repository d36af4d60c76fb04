"""The table of the publication (arXiv 2606.00079): 2-bit methods side by side, on seven tasks.

    python examples/reproduce_paper.py MODEL --dataset calibration.jsonl --gptq GPTQ_DIR --execute-code

Rows: full precision; GPTQ, if you have a checkpoint (made with GPTQModel); the two versions of the
publication ("paper-v1", "paper-v2": our reading of them, their quantizer was never published); the default of
this package. Columns: counted bits per expert weight, the tasks, their average, hours of quantization (if it
was not done before).

Published for Qwen3-30B-A3B-Base at "2 bits", averages of the seven tasks (on GPUs, by the authors):

| version | BitsMoE | GPTQ | MoEQuant | HQQ | GEMQ |
|---|---|---|---|---|---|
| v1 | 61.91 | 34.08 | 52.21 | 39.51 | |
| v2 | 64.29 | | | | 61.49 ("2.80 below") |

The seven are HellaSwag, MathQA, MMLU, OpenBookQA, WinoGrande, GSM8K and HumanEval. How they are scored we
found nowhere and assume: shots as lm-eval's tasks have them, length-normalized accuracy where a task has it.
The first version's "2 bits" are published as 8.58 GB for 54 GB of experts, which is 2.54 bits per weight with
its bases of 16 bits. --factor-bits 2.0 leaves bases out, --bits 2.0 counts everything for every method.

We have not run this on the full model. A GPU is used for the tasks if there is one; Qwen3-30B-A3B takes 61 GB
there unquantized, and as much as a GPTQ checkpoint, which is dequantized for evaluation.

HumanEval executes what the model writes: it is left out unless --execute-code is given.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.commands.compare.gptq_checkpoint import expert_bytes
from bitsmoe_plugin.commands.evaluate import load_for_evaluation
from bitsmoe_plugin.commands.evaluate_tasks import evaluate_tasks
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.integrations.transformers import quantize_to_directory

TASKS = "hellaswag,mathqa,mmlu,openbookqa,winogrande,gsm8k"
METRICS = ("acc_norm", "acc", "exact_match,strict-match", "pass@1,create_test")
METHODS = ("paper-v1", "paper-v2", "default")


def scores(model: str | Path, args: argparse.Namespace) -> dict[str, float]:
    """Percentages by task."""
    loaded = load_for_evaluation(str(model)).to("cuda" if torch.cuda.is_available() else "cpu")
    names = [*args.tasks.split(","), *(["humaneval"] if args.execute_code else [])]
    found = evaluate_tasks(
        loaded,
        AutoTokenizer.from_pretrained(args.model),
        names,
        task_dir=args.task_dir,
        limit=args.limit,
        batch_size=args.batch_size,
        unsafe_code=args.execute_code,
    )
    return {
        name: 100 * next(found[name][metric] for metric in METRICS if metric in found[name]) for name in names
    }


def quantize(method: str, args: argparse.Namespace) -> tuple[Path, float | None]:
    """Directory of the packed model, and the hours it took; None if it was there already."""
    out, start = args.out / method, time.monotonic()
    if out.exists():
        return out, None
    config = BitsMoEConfig(
        bits=args.bits,
        factor_bits=args.factor_bits,
        dataset=args.dataset,
        calibration_tokens=args.calibration_tokens,
        method=method,
    )
    quantize_to_directory(args.model, out, config)
    return out, (time.monotonic() - start) / 3600


def print_row(name: str, bits: float, found: dict[str, float], hours: float | None = None) -> None:
    """One line of the table; the first also prints its head."""
    if name == "full":
        print(f"| method | bits | {' | '.join(found)} | average | hours |\n{'|---' * (len(found) + 4)}|")
    cells = [f"{value:.2f}" for value in [*found.values(), sum(found.values()) / len(found)]]
    cells.append("" if hours is None else f"{hours:.2f}")
    print(f"| {name} | {bits:.3f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Quantize what is missing, evaluate, print the table line by line."""
    parser = argparse.ArgumentParser(description="The publication's table, with what is open.")
    parser.add_argument("model", help="hub name or directory, e.g. Qwen/Qwen3-30B-A3B-Base")
    parser.add_argument("--dataset", required=True, help="calibration text, .jsonl or .txt")
    parser.add_argument("--gptq", type=Path, help="GPTQ checkpoint of the model")
    parser.add_argument("--out", type=Path, default=Path("out/paper"))
    parser.add_argument("--bits", type=float, default=2.0, help="counted, bases included")
    parser.add_argument("--factor-bits", type=float, help="replaces --bits: without the bases")
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--task-dir", type=Path, help="directory of further tasks of lm-eval")
    parser.add_argument(
        "--execute-code", action="store_true", help="also humaneval, which runs generated code"
    )
    parser.add_argument("--limit", type=int, help="only the first examples of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    if args.execute_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    packed = {method: quantize(method, args) for method in METHODS}
    reports = {method: inspect_checkpoint(out) for method, (out, _) in packed.items()}
    dtype = AutoConfig.from_pretrained(args.model).dtype
    print_row("full", 8 * dtype.itemsize, scores(args.model, args))
    if args.gptq:
        weights = reports["default"]["expert_weights"]
        print_row("GPTQ", 8 * expert_bytes(args.gptq) / weights, scores(args.gptq, args))
    for method, (out, hours) in packed.items():
        print_row(method, reports[method]["bits_per_weight"], scores(out, args), hours)


if __name__ == "__main__":
    main()
