"""Quality of a whole model against all its bytes: the dense part at 16, 8 and 4 bits, and as `size` chooses.

    python examples/size_curve.py examples/moe-tiny --dataset examples/data/calibration.jsonl \
        --eval examples/data/eval.jsonl --data out/size_curve.json

First the experts at some budgets with each uniform ``dense_bits``, then for each of these the program at no
more bytes than that checkpoint has. Each point is written to ``--data`` at once, and not measured again if
the same command is started again. ``bitsmoe report PACKED --evaluation out/size_curve.json`` draws the curve;
``make size-curve`` measures the bundled model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.base.atomic_output import replace_file
from bitsmoe_plugin.commands.evaluate import evaluate_path
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.commands.quantize import quantize_to_directory
from bitsmoe_plugin.version import __version__

CHOSEN = "size"
"""Name of the program's points."""


def measure(args: argparse.Namespace, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize and evaluate; one point of a curve, named as in ``bitsmoe compare --json``."""
    config = BitsMoEConfig(
        dataset=args.dataset,
        calibration_tokens=args.calibration_tokens,
        method=args.method,
        seed=args.seed,
        **options,
    )
    with tempfile.TemporaryDirectory(prefix="bitsmoe-curve-") as scratch:
        out = Path(scratch) / "packed"
        quantize_to_directory(args.model, out, config)
        result = evaluate_path(str(out), args.eval, max_tokens=args.max_tokens, reference=args.model)
        sizes = inspect_checkpoint(out)
        return {
            "method": name,
            "bits_per_weight": sizes["bits_per_weight"],
            "expert_bytes": sizes["expert_bytes"],
            "total_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
            "perplexity": result.perplexity,
            "kl_divergence": result.kl_divergence,
            "top1_agreement": result.top1_agreement,
            "dense_layers": dense_layers(out),
            "options": options,
        }


def dense_layers(directory: Path) -> dict[str, list[str]]:
    """Width -> names of the layers that are stored in it; those in 16 are left out."""
    stored = json.loads((directory / "config.json").read_text())["quantization_config"].get("dense", {})
    found: dict[str, list[str]] = {}
    for group in stored.get("config_groups", {}).values():
        found.setdefault(str(group["weights"]["num_bits"]), []).extend(group["targets"])
    return found


def wanted(args: argparse.Namespace, done: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of all points; those of the program once the bytes of the uniform ones are known."""
    uniform = [(f"dense {d}", {"bits": b, "dense_bits": d}) for d in args.dense for b in args.bits]
    sizes = sorted({point["total_bytes"] for point in done if point["method"] != CHOSEN})
    return uniform + [(CHOSEN, {"size": size}) for size in sizes]


def main() -> None:
    """Parse options, measure what is missing, and print a Markdown table."""
    args = parse()
    settings = {name: getattr(args, name) for name in ("calibration_tokens", "max_tokens", "method", "seed")}
    settings |= {"model": Path(args.model).name, "version": __version__}
    kept = json.loads(args.data.read_text()) if args.data.exists() else {"settings": settings, "results": []}
    if kept["settings"] != settings:
        sys.exit(f"{args.data} was measured with {kept['settings']}, not {settings}; remove it to start anew")
    points = kept["results"]
    while missing := [(n, o) for n, o in wanted(args, points) if o not in [p["options"] for p in points]]:
        name, options = missing[0]
        print(f"{name} {options}, {len(missing)} to do", file=sys.stderr, flush=True)
        points.append(measure(args, name, options))
        args.data.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.data, (json.dumps(kept, indent=1) + "\n").encode())
    print("| dense part | bits of the experts | total bytes | perplexity | KL | same top token |")
    print("|---|---|---|---|---|---|")
    for point in sorted(points, key=lambda point: (point["total_bytes"], point["method"])):
        print(
            f"| {point['method']} | {point['bits_per_weight']:.3f} | {point['total_bytes']:,} "
            f"| {point['perplexity']:.2f} | {point['kl_divergence']:.5f} "
            f"| {100 * point['top1_agreement']:.1f} % |"
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True, help="calibration text, .txt or .jsonl")
    parser.add_argument("--eval", required=True, help="evaluation text, .txt or .jsonl")
    parser.add_argument("--data", required=True, type=Path, help="where points are written, a .json file")
    parser.add_argument("--bits", type=float, nargs="+", default=[1.6, 2.0, 2.5, 3.0])
    parser.add_argument("--dense", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--method", default="default")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
