"""Experts in 2 bits by this package, attention in 8 bits by torchao.

    pip install torchao        # tried: 0.18.0 with torch 2.13 and transformers 5.24, on a CPU

torchao quantizes the attention of a packed model after it was loaded: here weights alone, to int8 with a
scale per row. The router, embeddings and norms stay as they are (they are small, and the router decides).

What torchao does is not saved: config.json names one quantization method, and that is ours. Save the packed
model, and apply torchao each time it is loaded (it needs no calibration and gives the same values each time).
Do not call save_pretrained on the mixed model. For attention in 8 or 4 bits in the checkpoint and in vLLM,
quantize with dense_bits instead (docs/using.md).

Run it from the root of the repository (a minute on 2 CPU cores), after quickstart.py, which writes the model.
"""

# %%
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin.commands.evaluate import evaluate_text

PACKED = "out/quickstart"
EVALUATION = "examples/data/eval.jsonl"
EVALUATION_TOKENS = 20_000


def is_attention(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and ".self_attn." in name


def attention_bytes(model: torch.nn.Module) -> int:
    """Codes and scales, or 16-bit weights."""
    layers = [module.weight for name, module in model.named_modules() if is_attention(module, name)]
    parts = [[w.qdata, w.scale] if hasattr(w, "qdata") else [w] for w in layers]
    return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part)


# %% Load the packed model; its experts are no Linear layers, so torchao leaves them alone in any case
model = AutoModelForCausalLM.from_pretrained(PACKED)
tokenizer = AutoTokenizer.from_pretrained(PACKED)
size = attention_bytes(model)
before = evaluate_text(model, tokenizer, EVALUATION, max_tokens=EVALUATION_TOKENS)

# %% Quantize attention
quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_attention)
after = evaluate_text(model, tokenizer, EVALUATION, max_tokens=EVALUATION_TOKENS)
print(f"attention: {size:,} -> {attention_bytes(model):,} bytes")
print(f"perplexity: {before.perplexity:.2f} -> {after.perplexity:.2f}")
