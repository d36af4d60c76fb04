"""README.md of a packed checkpoint: what it is, what it was made with, how to load it, how good it is."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM

from bitsmoe_plugin.base.atomic_output import replace_file
from bitsmoe_plugin.checkpoint.manifest import TAGS
from bitsmoe_plugin.checkpoint.prediction_layers import PredictionSize
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.checkpoint.untrusted_values import number
from bitsmoe_plugin.codec.dense import dense_schemes
from bitsmoe_plugin.commands.inspect import inspect_checkpoint, quantized_super_experts
from bitsmoe_plugin.commands.report.checkpoint_data import PART_NAMES
from bitsmoe_plugin.commands.report.evaluation_data import task_rows
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.model_class import auto_class
from bitsmoe_plugin.pipeline.tuning_settings import LEARNABLE, WAYS
from bitsmoe_plugin.version import __version__

_TEXT = """
# {base}, experts in {bits:.2f} bits

The routed experts of {base} in {bits:.3f} bits per weight, quantized with BitsMoE
([arXiv 2606.00079](https://arxiv.org/abs/2606.00079)) by bitsmoe-plugin {version}. Everything that is stored
for the experts is counted; {dense}.

| stored for the experts | bits per weight |
|---|---|
{parts}

- Method `{method}`, budget `{budget}`; {experts:,} expert weights in {layers} layers, {size}
- Whole model: {total:,} bytes, {total_bits:.3f} bits per weight.
- Calibration: {text}{tokens:,} tokens (SHA-256 of the token ids {digest}).{super_experts}{tuning}
{errors}

## Use

```python
# pip install bitsmoe-plugin
from transformers import {loader}

model = {loader}.from_pretrained("DIR")  # stays packed; nothing else has to be imported
```

```sh
vllm serve DIR --quantization bitsmoe
```

DIR is this directory, or its name on the hub. `bitsmoe inspect DIR` shows where the bits went.

## Measured

{measured}
"""
BEGIN, END = "<!-- bitsmoe: measured -->", "<!-- bitsmoe: end -->"
"""Around what ``record_evaluation`` writes and replaces."""
_NOTHING_YET = (
    "Nothing yet: `bitsmoe evaluate DIR --dataset FILE --card` measures perplexity and writes it here."
)


def model_card(directory: Path, base_model: str | None, dataset: Any = None) -> ModelCard:
    """The card of a packed checkpoint; the same wherever it is.

    Args:
        directory: where it is.
        base_model: hub name, or directory, of the unquantized model; of a directory only its name is told.
            None: not known, then the name of ``directory`` stands for it.
        dataset: what it was calibrated on; only the name of a file is told.

    Raises:
        CheckpointError: no packed checkpoint.
    """
    report, config = inspect_checkpoint(directory), read_config(directory)
    base_model = str(directory) if base_model is None else base_model
    local = Path(base_model).exists()
    loader = auto_class(AutoConfig.from_pretrained(directory))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if loader is AutoModelForCausalLM else "image-text-to-text",
        tags=list(TAGS),
        base_model=None if local else base_model,
        base_model_relation=None if local else "quantized",
    )
    base = Path(base_model).resolve().name if local else base_model
    facts = _facts(report, config, base) | {
        "loader": loader.__name__,
        "text": f"{Path(dataset).name}, " if isinstance(dataset, (str, Path)) else "",
        "measured": _section(_NOTHING_YET),
    }
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{_TEXT.format(**facts)}")


def _section(text: str) -> str:
    return f"{BEGIN}\n{text}\n{END}"


def _facts(report: dict[str, Any], config: BitsMoEConfig, base: str) -> dict[str, Any]:
    layers = report["layers"].values()
    parts = {PART_NAMES[part]: bits for part, bits in report["parts"].items()}
    calibration = report["calibration"]
    return {
        "base": base,
        "version": __version__,
        "bits": report["bits_per_weight"],
        "parts": "\n".join(f"| {part} | {bits:.4f} |" for part, bits in parts.items() if bits),
        "method": config.method,
        "budget": _budget(config),
        "experts": report["expert_weights"],
        "layers": len(layers),
        "size": f"{report['expert_bytes']:,} bytes.{_prediction(report['prediction'])}",
        "dense": _dense(config),
        "total": report["total_bytes"],
        "total_bits": report["total_bits_per_weight"],
        "tokens": calibration.get("tokens", 0),
        "digest": calibration.get("sha256", "unknown")[:16],
        "super_experts": _super_experts(list(layers)),
        "tuning": _tuning(calibration.get("tuning")),
        "errors": _errors(list(layers)),
    }


def _dense(config: BitsMoEConfig) -> str:
    schemes = Counter(scheme.bits for scheme in dense_schemes(config.dense).values())
    if not schemes:
        return "attention, router, embeddings, shared experts and dense layers are as they were"
    counts = " and ".join(f"{count} in {bits} bits" for bits, count in sorted(schemes.items()))
    return (
        f"of the linear layers outside of them {counts} (compressed-tensors, pack-quantized); all else is as "
        "it was"
    )


def _prediction(sizes: dict[str, int]) -> str:
    text = PredictionSize(**sizes).describe()
    return f"\n- Besides: {text}." if text else ""


def _super_experts(layers: list[dict[str, Any]]) -> str:
    kept = sum(len(layer["kept_experts"]) for layer in layers)
    bits = [layer["expert_bits"][expert] for layer in layers for expert in quantized_super_experts(layer)]
    lines = [f"\n- {kept} super experts keep their original weights."] if kept else []
    if bits:
        lines.append(f"\n- {len(bits)} super experts have rows of {statistics.mean(bits):.3g} bits.")
    return "".join(lines)


def _tuning(told: Any) -> str:
    """What ``tuning`` noted, if it did."""
    names = ("tokens", "before", "after")
    values = [number(told, name) for name in names] if isinstance(told, dict) else []
    if not values or None in values:
        return ""
    tokens, before, after = values
    learnt = told.get("learnt", ["bases"])  # older releases tuned these
    known = [name for name in LEARNABLE if isinstance(learnt, (list, tuple)) and name in learnt]
    through = told.get("through")
    way = f" {WAYS[through]}" if isinstance(through, str) and through in WAYS else ""
    return (
        f"\n- Tuned{way} ({', '.join(known)}) on {tokens:,.0f} tokens: KL to the original on held-out text "
        f"{before:.4f} before, {after:.4f} after. What else is told about errors was measured before."
    )


def _budget(config: BitsMoEConfig) -> str:
    total = f"bits={config.bits:g}" if config.factor_bits is None else f"factor_bits={config.factor_bits:g}"
    if config.size or config.fit:
        total = f"size={config.size}" if config.size else f"fit={config.fit}"
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


def write_model_card(directory: str | Path, base_model: str | None = None, dataset: Any = None) -> None:
    """Write the card of a packed checkpoint as README.md, unless there is one.

    The command line and ``BitsMoEQuantizer.quantize`` of optimum do so themselves; ``save_pretrained`` of
    transformers has no hook that is told where a model is saved.

    Args:
        directory: where it was saved.
        base_model, dataset: see ``model_card``.

    Raises:
        CheckpointError: no packed checkpoint.
    """
    path = Path(directory) / "README.md"
    if not path.exists():
        replace_file(path, _encoded(str(model_card(Path(directory), base_model, dataset))))


def record_evaluation(directory: Path, result: dict[str, Any]) -> None:
    """Write what was measured into the card of a packed checkpoint, in place of what it said before.

    A card without a place for it, as other programs write them, gets one at its end; all other text stays.

    Args:
        directory: of the checkpoint; without a card it gets one.
        result: what ``bitsmoe evaluate --json`` prints.

    Raises:
        CheckpointError: no packed checkpoint.
    """
    write_model_card(directory)
    path = Path(directory) / "README.md"
    card = path.read_bytes().decode("utf-8", "surrogateescape")
    section = _section("\n\n".join(_measured_text(result) + _measured_tasks(result)))
    place = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if place.search(card):
        card = place.sub(lambda _: section, card, count=1)
    else:
        card = f"{card.rstrip()}\n\n## Measured\n\n{section}\n"
    replace_file(path, _encoded(card))


def _encoded(card: str) -> bytes:
    # In the C locale, names of files beyond ASCII arrive as escaped bytes.
    return card.encode("utf-8", "surrogateescape")


def _measured_text(result: dict[str, Any]) -> list[str]:
    """Paragraphs about perplexity and divergence, if they were measured."""
    if "perplexity" not in result:
        return []
    stride = f", each {result['stride']} after the last" if result.get("stride") else ""
    texts = [
        f"Perplexity on {result['dataset']}, {result['tokens']:,} tokens in blocks of "
        f"{result['sequence_length']}{stride}: **{result['perplexity']:.3f}**"
    ]
    domains = result["per_domain"]
    if len(domains) > 1:
        rows = [f"| {name} | {value:.3f} |" for name, value in domains.items()]
        texts.append("\n".join(["| text | perplexity |", "|---|---|", *rows]))
    if "kl_divergence" in result:
        texts.append(
            f"Against {result['reference']}: KL divergence {result['kl_divergence']:.4f} nats per token, the "
            f"same most likely token at {100 * result['top1_agreement']:.1f} % of the positions."
        )
        texts += _measured_tokens(result) + _measured_routing(result)
    return texts


def _measured_tokens(result: dict[str, Any]) -> list[str]:
    """A table of the distribution of divergences over tokens; nothing of results that do not have it."""
    if "kl_median" not in result:
        return []
    head = "| median KL | 99 % of tokens up to | 99.9 % up to | RMS change of the token's probability |"
    values = [f"{result[name]:.4f}" for name in ("kl_median", "kl_99", "kl_999")]
    values.append(f"{100 * result['probability_change']:.2f} %")
    return [f"{head}\n|---|---|---|---|\n| {' | '.join(values)} |"]


def _measured_routing(result: dict[str, Any]) -> list[str]:
    """How often other experts are selected, or why that is not known."""
    if "routing_unknown" in result:
        return [f"How often other experts are selected is not known: {result['routing_unknown']}"]
    if "routing_change" not in result:
        return []
    layers = ", ".join(f"{100 * share:.1f}" for share in result["routing_change_by_layer"].values())
    return [
        f"Another set of experts is selected for {100 * result['routing_change']:.1f} % of the tokens, mean "
        f"of the layers; from the first layer to the last: {layers} %."
    ]


def _measured_tasks(result: dict[str, Any]) -> list[str]:
    """A table of tasks, if there were any."""
    rows = [
        f"| {row.task} | {row.metric} | {row.value:.4f} | {'' if row.error is None else f'{row.error:.4f}'} |"
        for row in task_rows(result.get("tasks"))
    ]
    head = ["| task of lm-eval | metric | value | standard error |", "|---|---|---|---|"]
    return ["\n".join(head + rows)] if rows else []
