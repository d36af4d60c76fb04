"""Qwen3-30B-A3B from end to end: estimate, quantize, evaluate, serve.

    python examples/qwen3_30b_a3b.py --dataset calibration.jsonl --eval eval.jsonl

The texts are yours: some megabytes of what the model will be used for (.jsonl with a field "text", or .txt).
Everything is resumable: after Ctrl-C or a crash the same command goes on after the last finished layer.

What it takes, at 2.0 bits with 131,072 calibration tokens. Nobody has run this on the full model yet: the
numbers follow from the model's config.json, or were measured on one of its 48 layers.

| | | from |
|---|---|---|
| download | 61.1 GB | its index |
| packed checkpoint | 10.3 GB (experts 7.2 GB instead of 58.0) | counted; `bitsmoe estimate` |
| disk besides the download | 21 GB while quantizing | packed layers, plans, hidden states; checkpoint |
| memory while quantizing | 15 GB, on the CPU | `bitsmoe estimate`; 7 to 29 % too much on small models |
| time, 2 cores | 10 hours | `bitsmoe estimate`: 7.5 * 10^15 operations in matrix products at 265 |
| | | GFLOP/s (measured), 4.8 core hours of rounding |
| time, 32 cores at 3 TFLOP/s | 1 hour | the same formula; not tried |
| time, one H100 | 10 s for a layer with 8,192 tokens | measured, without calibration's forward passes |
| memory to serve or evaluate | 10.3 GB and the key-value cache | packed experts stay packed |
| speed of one MoE layer on 2 cores | 1.5 ms for a token, 9.9 ms for 16 | measured: examples/speed.md |

Layers are quantized on a GPU, one at a time, if there is one, and evaluated there. Several processes or
machines share the layers with `torchrun --nproc-per-node N -m bitsmoe_plugin quantize ...`.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.base.devices import choose_device
from bitsmoe_plugin.commands.estimate import estimate, print_estimate
from bitsmoe_plugin.commands.evaluate import evaluate_text
from bitsmoe_plugin.commands.inspect import inspect_checkpoint, print_inspection
from bitsmoe_plugin.integrations.transformers import quantize_to_directory


def local(model: str, *patterns: str) -> Path:
    """The model's directory, or that of its files from the hub that match."""
    return Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=patterns))


def main() -> None:
    """Run the steps that are not done yet."""
    parser = argparse.ArgumentParser(description="Quantize Qwen3-30B-A3B, evaluate it, say how to serve it.")
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="hub name or directory")
    parser.add_argument("--out", type=Path, default=Path("out/qwen3-30b-a3b-2bit"))
    parser.add_argument("--dataset", required=True, help="calibration text, .jsonl or .txt")
    parser.add_argument("--eval", required=True, help="evaluation text, .jsonl or .txt")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    args = parser.parse_args()
    config = BitsMoEConfig(bits=args.bits, dataset=args.dataset, calibration_tokens=args.calibration_tokens)

    print("== Estimate, from config.json and the index alone")
    print_estimate(estimate(local(args.model, "*.json"), config), sys.stdout)

    print("== Quantize")
    if args.out.exists():
        print(f"{args.out} is there already")
    else:
        files = local(args.model, "*.json", "*.safetensors", "*.txt", "*.jinja")
        quantize_to_directory(str(files), args.out, config, choose_device("auto"))
    print_inspection(inspect_checkpoint(args.out), sys.stdout)

    print("== Evaluate")
    model = AutoModelForCausalLM.from_pretrained(args.out).to(choose_device("auto"))
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    result = evaluate_text(model, tokenizer, args.eval, max_tokens=args.eval_tokens)
    print(f"perplexity {result.perplexity:.3f} on {result.tokens:,} tokens")
    print("Against full precision, which takes the memory of both models:")
    print(f"  bitsmoe evaluate {args.out} --dataset {args.eval} --reference {args.model}")

    print("== Serve (pip install 'bitsmoe-plugin[vllm]'), then examples/vllm_client.py")
    print(f"  vllm serve {args.out} --max-model-len 8192")


if __name__ == "__main__":
    main()
