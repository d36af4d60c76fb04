"""Spend the bits where you want them: budgets of single layers and of single projections.

By default one budget (``bits``) is spent over all rows of all layers, wherever a bit saves most error. Two
options take parts out of it; what is left is still spent by the integer program:

- ``layer_bits``: counted bits of a layer's experts, all that is stored for them.
- ``projection_bits``: bits of all rows of gate, up or down (payload, codes, scales; the bases are shared).

On the command line:

    bitsmoe quantize examples/moe-tiny OUT --bits 2.0 --dataset examples/data/calibration.jsonl \
        --option 'layer_bits={"model.layers.0.mlp.experts": 3.0}' --option 'projection_bits={"down": 2.25}'

Run it from the root of the repository (two minutes on 2 CPU cores). To mix with other bits for attention:
attention_8bit.py.
"""

# %%
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.commands.evaluate import evaluate_text
from bitsmoe_plugin.commands.inspect import inspect_checkpoint

MODEL = "examples/moe-tiny"
OUT = "out/custom-budget"
CALIBRATION = "examples/data/calibration.jsonl"
CALIBRATION_TOKENS = 8192
EVALUATION = "examples/data/eval.jsonl"
EVALUATION_TOKENS = 20_000
FIRST = "model.layers.0.mlp.experts"

BUDGETS = {
    "one budget": {},
    "3 bits for the first layer": {"layer_bits": {FIRST: 3.0}},
    "2.25 bits for down": {"projection_bits": {"down": 2.25}},
}
"""All at 2.0 bits in total."""

# %% What cannot be met is refused before any weight is read, with the smallest number that can.
try:
    estimate(Path(MODEL), BitsMoEConfig(bits=2.0, layer_bits={FIRST: 9.0}))
except QuantizationError as error:
    print(f"refused: {error}\n")

# %% Quantize with each, and see that the bits went where they should
tokenizer = AutoTokenizer.from_pretrained(MODEL)
for number, (name, options) in enumerate(BUDGETS.items()):
    config = BitsMoEConfig(bits=2.0, dataset=CALIBRATION, calibration_tokens=CALIBRATION_TOKENS, **options)
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
    model.save_pretrained(f"{OUT}/{number}")
    report = inspect_checkpoint(Path(f"{OUT}/{number}"))
    layers = ", ".join(f"{layer['bits_per_weight']:.3f}" for layer in report["layers"].values())
    projections = ", ".join(f"{key} {bits:.3f}" for key, bits in report["projections"].items())
    result = evaluate_text(model, tokenizer, EVALUATION, reference=MODEL, max_tokens=EVALUATION_TOKENS)
    print(f"{name}: {report['bits_per_weight']:.4f} bits (by layer {layers}; {projections})")
    print(f"    perplexity {result.perplexity:.2f}, KL divergence {result.kl_divergence:.4f}\n")
