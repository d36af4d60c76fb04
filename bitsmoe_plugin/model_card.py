"""README.md of a packed checkpoint: what it is, what it was made with, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.inspection import inspect_checkpoint, read_config
from bitsmoe_plugin.version import __version__

_TEXT = """
# {base}, experts in {bits:.2f} bits

The routed experts of {base} in {bits:.3f} bits per weight, quantized with BitsMoE
([arXiv 2606.00079](https://arxiv.org/abs/2606.00079)) by bitsmoe-plugin {version}. Everything that is stored
for the experts is counted; attention, router, embeddings, shared experts and dense layers are as they were.

| stored for the experts | bits per weight |
|---|---|
{parts}

- Method `{method}`, budget `{budget}`; {experts:,} expert weights in {layers} layers, {size:,} bytes.
- Calibration: {tokens:,} tokens (SHA-256 of the token ids {digest}).{super_experts}
{errors}

## Use

```python
# pip install bitsmoe-plugin
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```

```sh
vllm serve DIR --quantization bitsmoe
```

DIR is this directory, or its name on the hub. `bitsmoe inspect DIR` shows where the bits went,
`bitsmoe evaluate DIR --dataset FILE` measures perplexity.
"""


def model_card(directory: Path, base_model: str) -> ModelCard:
    """The card of a packed checkpoint; the same wherever it is.

    Args:
        directory: where it is.
        base_model: hub name, or directory, of the unquantized model; of a directory only its name is told.

    Raises:
        CheckpointError: no packed checkpoint.
    """
    report, config = inspect_checkpoint(directory), read_config(directory)
    local = Path(base_model).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["bitsmoe", "mixture-of-experts", "quantized"],
        base_model=None if local else base_model,
        base_model_relation=None if local else "quantized",
    )
    base = Path(base_model).resolve().name if local else base_model
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{_TEXT.format(**_facts(report, config, base))}")


def _facts(report: dict[str, Any], config: BitsMoEConfig, base: str) -> dict[str, Any]:
    layers = report["layers"].values()
    kept = sum(len(layer["kept_experts"]) for layer in layers)
    calibration = report["calibration"]
    return {
        "base": base,
        "version": __version__,
        "bits": report["bits_per_weight"],
        "parts": "\n".join(f"| {part} | {bits:.4f} |" for part, bits in report["parts"].items() if bits),
        "method": config.method,
        "budget": _budget(config),
        "experts": report["expert_weights"],
        "layers": len(layers),
        "size": report["expert_bytes"],
        "tokens": calibration.get("tokens", 0),
        "digest": calibration.get("sha256", "unknown")[:16],
        "super_experts": f"\n- {kept} super experts keep their original weights." if kept else "",
        "errors": _errors(list(layers)),
    }


def _budget(config: BitsMoEConfig) -> str:
    total = f"bits={config.bits:g}" if config.factor_bits is None else f"factor_bits={config.factor_bits:g}"
    tables = {"layer_bits": config.layer_bits, "projection_bits": config.projection_bits}
    return ", ".join([total, *(f"{option}={table}" for option, table in tables.items() if table)])


def _errors(layers: list[dict[str, Any]]) -> str:
    """Range over the layers of the output error on calibration text, if it was measured."""
    shares = [
        layer["calibration_error"] / layer["output_energy"]
        for layer in layers
        if layer.get("calibration_error") is not None and layer.get("output_energy")
    ]
    if not shares:
        return ""
    return (
        f"- Output error of a layer's experts on calibration text: {100 * min(shares):.2g} to "
        f"{100 * max(shares):.2g} % of their energy."
    )


def write_model_card(directory: Path, base_model: str) -> None:
    """Write the card as README.md, unless there is one."""
    path = Path(directory) / "README.md"
    if not path.exists():
        # In the C locale, names of files beyond ASCII arrive as escaped bytes.
        content = str(model_card(directory, base_model)).encode("utf-8", "surrogateescape")
        path.write_bytes(content)
