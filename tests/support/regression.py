"""Quality of the bundled model at four budgets, and how much of it is chance: ``regression.json``.

``python tests/support/regression.py`` writes the file anew, after a change that was meant to change quality.
Chance
is what remains when nothing is changed that matters: all expert weights are multiplied by 1 + 1e-4 times a
unit Gaussian, a tenth of what storing them in bfloat16 has done to them, which flips ties in rounding and so
changes everything after them as another processor, thread count or order of sums would.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.calibration.text import load_documents, token_blocks
from bitsmoe_plugin.checkpoint.manifest import packed_spec
from bitsmoe_plugin.commands.evaluate import evaluate_model, evaluation_text
from bitsmoe_plugin.pipeline import quantize_model

EXAMPLES = Path(__file__).parents[2] / "examples"
FILE = Path(__file__).parents[1] / "regression.json"
BITS = (1.6, 2.0, 3.0, 4.0)
RUNS = 12
OPTIONS: dict[str, Any] = {"calibration_tokens": 8192, "sequence_length": 256}
EVALUATION_TOKENS = 24_000


def measure(bits: float, noise: int | None = None) -> dict[str, float]:
    """Numbers of the bundled model, calibrated and evaluated on the bundled text; less is better in each.

    Args:
        noise: seed of the disturbance of the weights, None for none.

    Returns:
        ``bits_per_weight``, sums over the layers of the output error as ``estimated`` by the program's costs
        (the surrogate), on ``calibration`` text and on ``unseen`` text, ``perplexity`` over that of the
        unquantized model, and ``kl_divergence`` from it.
    """
    path = EXAMPLES / "moe-tiny"
    tokenizer = AutoTokenizer.from_pretrained(path)
    full, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    if noise is not None:
        _disturb(model, noise)
    config = BitsMoEConfig(bits=bits, **OPTIONS)
    blocks = token_blocks(
        load_documents(EXAMPLES / "data" / "calibration.jsonl"),
        tokenizer,
        sequence_length=config.sequence_length,
        max_tokens=config.calibration_tokens,
        vocab_size=model.config.vocab_size,
        seed=config.seed,
    )
    config = quantize_model(model, blocks, config)
    text = evaluation_text(
        str(EXAMPLES / "data" / "eval.jsonl"), tokenizer, sequence_length=256, max_tokens=EVALUATION_TOKENS
    )
    result = evaluate_model(model, text, reference=full)
    errors = {
        name: sum(entry["report"][f"{name}_error"] for entry in config.layers.values())
        for name in ("estimated", "calibration", "unseen")
    }
    return {
        "bits_per_weight": _stored_bits(model)
        / sum(packed_spec(name, config).shape.weights for name in config.layers),
        **errors,
        "perplexity": result.perplexity / evaluate_model(full, text).perplexity,
        "kl_divergence": result.kl_divergence,
    }


def _stored_bits(model: torch.nn.Module) -> int:
    """Bits of everything that is stored for the routed experts."""
    return sum(8 * t.nbytes for name, t in model.state_dict().items() if ".bitsmoe_" in name)


def _disturb(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.mul_(1 + 1e-4 * torch.randn(parameter.shape, generator=generator))


def main() -> None:
    """Write the file: of each number the mean of all runs and their standard deviation."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for bits in logging.tqdm(BITS, desc="Measuring"):
        runs = [measure(bits, noise) for noise in range(RUNS)]
        found[str(bits)] = {
            name: {
                "mean": statistics.mean(run[name] for run in runs),
                "deviation": statistics.stdev(run[name] for run in runs),
            }
            for name in runs[0]
        }
    FILE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
