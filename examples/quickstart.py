"""Quantize a Mixture-of-Experts model to 2 bits, look at it, save it and load it again.

Run it from the root of the repository (a minute or two on 2 CPU cores), or cell by cell in an editor that
knows "# %%". Every constant of the first cell may be changed.
"""

# %% What to quantize
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.commands.evaluate import evaluate_text
from bitsmoe_plugin.commands.inspect import inspect_checkpoint, print_inspection

MODEL = "examples/moe-tiny"  # a directory, or a name on the hub
CALIBRATION = "examples/data/calibration.jsonl"
EVALUATION = "examples/data/eval.jsonl"
OUT = "out/quickstart"
BITS = 2.0  # everything that is stored for the experts, over their number of weights
CALIBRATION_TOKENS = 16_384  # the default is 131_072; more is better, and slower
EVALUATION_TOKENS = 20_000

# %% Load and quantize. The experts are read, quantized and packed one layer after the other.
config = BitsMoEConfig(bits=BITS, dataset=CALIBRATION, calibration_tokens=CALIBRATION_TOKENS)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
tokenizer = AutoTokenizer.from_pretrained(MODEL)

# %% Save it, packed. The tokenizer makes the directory complete.
model.save_pretrained(OUT)
tokenizer.save_pretrained(OUT)
# To publish it (after `hf auth login`):
# model.push_to_hub("your-name/moe-tiny-2bit")
# tokenizer.push_to_hub("your-name/moe-tiny-2bit")

# %% Where did the bits go?
print_inspection(inspect_checkpoint(Path(OUT)), sys.stdout)

# %% How far is it from full precision, on text that calibration has not seen?
result = evaluate_text(model, tokenizer, EVALUATION, reference=MODEL, max_tokens=EVALUATION_TOKENS)
full = AutoModelForCausalLM.from_pretrained(MODEL)
before = evaluate_text(full, tokenizer, EVALUATION, max_tokens=EVALUATION_TOKENS)
print(f"perplexity {before.perplexity:.2f} -> {result.perplexity:.2f}")
print(f"KL divergence {result.kl_divergence:.4f}, same most likely token {result.top1_agreement:.1%}")

# %% Generate with it
prompt = tokenizer("In the beginning there was", return_tensors="pt", return_token_type_ids=False)
text = model.generate(**prompt, max_new_tokens=30, do_sample=False, repetition_penalty=1.3)
print(tokenizer.decode(text[0]))

# %% Load it, in this process or another one: it stays packed, and computes bit for bit the same.
again = AutoModelForCausalLM.from_pretrained(OUT)
with torch.no_grad():
    assert torch.equal(again(**prompt).logits, model(**prompt).logits)
print(f"loaded again from {OUT}: the same logits")
