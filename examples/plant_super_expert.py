"""Plant a super expert in the bundled model, and measure what quantization leaves of it.

    python examples/plant_super_expert.py examples/moe-tiny OUT --dataset examples/data/calibration.jsonl \
        --eval examples/data/eval.jsonl

Super experts (arXiv 2507.23279) make the massive activations that attention sinks rest on: heads with
nothing to say attend to a token whose value is zero. The bundled model has none, so the mechanism is built
in, without training and without changing what the model computes:

* a neuron of one expert answers to the token that every sequence begins with, and writes about two thousand
  times the residual stream's median into one channel;
* every later layer gets two more attention heads, which attend to massive tokens, where their value is zero.
  If there is none, they attend to all tokens alike, and add as much noise as there is residual stream.

As in large models, perplexity is then lost altogether with that one expert, and with no other.
Sequences begin with the end-of-text token. Prints a Markdown table, and writes the model to OUT.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.calibration.text import load_documents, token_stream
from bitsmoe_plugin.codec.layout import row_widths
from bitsmoe_plugin.commands.evaluate import EvaluationText, evaluate_model

LAYER = 1
LENGTH = 256
SIZE = 1000.0
"""Of the massive activation; the residual stream's median is 0.5 there."""
SHARPNESS = 16.0
"""Input of the gate's silu at the first token; at all others it was -3 or less."""
PREFERENCE = 6.0
"""Added to the expert's router logit at the first token."""


@dataclass(frozen=True)
class Planted:
    """Attributes:
    model: in bfloat16.
    layer: path of the experts module.
    expert: the super expert.
    channel: of the residual stream, that it writes to.
    """

    model: Any
    layer: str
    expert: int
    channel: int


def sequences(dataset: str, tokenizer: Any, count: int, length: int = LENGTH) -> Tensor:
    """``[count, length]`` tokens, the first of each sequence the end-of-text token, and no other.

    Raises:
        ValueError: the dataset is too short.
    """
    first = tokenizer.eos_token_id
    text = [token for token in token_stream(load_documents(dataset), tokenizer) if token != first]
    blocks = torch.tensor(text[: len(text) // (length - 1) * (length - 1)]).view(-1, length - 1)
    if len(blocks) < count:
        raise ValueError(f"{dataset} holds {len(blocks)} sequences of {length - 1} tokens, not {count}")
    # Spread over the file, whose documents of one kind stand together.
    chosen = blocks[torch.arange(count) * len(blocks) // count]
    return torch.cat([torch.full((count, 1), first), chosen], 1)


def add_heads(model: Any) -> Any:
    """The same model in float32 with one more group of attention heads, and biases, that do nothing yet."""
    config = copy.deepcopy(model.config)
    config.num_attention_heads += config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads += 1
    config.attention_bias = True
    wider = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = model.state_dict()
    for name, tensor in wider.state_dict().items():
        tensor.zero_()
        if name in weights:
            tensor[tuple(slice(0, size) for size in weights[name].shape)] = weights[name].float()
    return wider


def inputs_of(model: Any, name: str, tokens: Tensor) -> Tensor:
    """What a module is called with, ``[B, S, H]`` float32."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].float()))
    model(tokens, use_cache=False)
    handle.remove()
    return seen[0]


def detector(x: Tensor, elsewhere: float) -> Tensor:
    """Direction ``[H]`` whose product with the inputs ``[B, S, H]`` is 1 at the first token of a sequence and
    ``elsewhere`` on average at the others."""
    batch, length, hidden = x.shape
    wanted = torch.full((batch, length), elsewhere)
    weight = torch.full((batch, length), 0.5 / (batch * (length - 1)))
    wanted[:, 0], weight[:, 0] = 1.0, 0.5 / batch
    x, weighted = x.flatten(0, 1), (x * weight[..., None]).flatten(0, 1)
    moment = x.T @ weighted
    ridge = 1e-2 * moment.diagonal().mean() * torch.eye(hidden)
    return torch.linalg.solve(moment + ridge, weighted.T @ wanted.flatten())


def plant_expert(model: Any, tokens: Tensor) -> tuple[int, int]:
    """Make one expert of ``LAYER`` a super expert; returns the expert and the channel that it writes to."""
    block = model.model.layers[LAYER].mlp
    x = inputs_of(model, f"model.layers.{LAYER}.mlp", tokens)
    gate, up = SHARPNESS * detector(x, -2.0), detector(x, 0.0)
    expert = int((x[0, 0] @ block.gate.weight.T).argmax())
    block.gate.weight[expert] += PREFERENCE * up
    # The channel that ordinary tokens use least, relative to each token's size.
    residual = inputs_of(model, f"model.layers.{LAYER + 1}.input_layernorm", tokens)
    used = (residual / residual.square().mean(-1, keepdim=True).sqrt()).abs().amax((0, 1))
    channel = int(used.argmin())
    weights, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    size = down.shape[1]
    hidden = F.silu(x @ weights[:size].T) * (x @ weights[size:].T)
    neuron = int((hidden.square().mean((0, 1)) * down.square().sum(0)).argmin())
    weights[neuron], weights[size + neuron] = gate, up
    down[:, neuron] = 0.0
    first = x[0, 0]
    down[channel, neuron] = SIZE / (F.silu(gate @ first) * (up @ first))
    return expert, channel


def rest_on(model: Any, index: int, channel: int, noise: float, generator: torch.Generator) -> None:
    """Let the heads that ``add_heads`` added to a layer rest on tokens that are massive in ``channel``.

    Args:
        noise: root mean square of what they add where there is no such token.
    """
    layer = model.model.layers[index]
    attention, width = layer.self_attn, model.config.head_dim
    keys = slice(-width, None)
    queries = slice(-width * model.config.num_attention_heads // model.config.num_key_value_heads, None)
    # What the norm makes of a token that has nothing else.
    massive = float(model.config.hidden_size**0.5 * layer.input_layernorm.weight[channel])
    # The pair of values that rotates least with the position.
    slow = torch.zeros(width)
    slow[[width // 2 - 1, width - 1]] = 1.0
    key = 20.0 * slow * attention.k_norm.weight.sign()
    attention.q_proj.bias[queries] = (20.0 * slow * attention.q_norm.weight.sign()).repeat(
        attention.q_proj.bias[queries].numel() // width
    )
    attention.k_proj.bias[keys] = -0.75 * key
    attention.k_proj.weight[keys, channel] = key / massive
    value = torch.randn(width, generator=generator)
    attention.v_proj.bias[keys] = value
    attention.v_proj.weight[keys, channel] = -value / massive
    out = attention.o_proj.weight[:, queries]
    out.copy_(noise * torch.randn(out.shape, generator=generator) / out.shape[1] ** 0.5)


@torch.no_grad()
def plant(dense: Any, tokens: Tensor) -> Planted:
    """A copy of a Qwen3-MoE model that has one super expert.

    Args:
        tokens: ``[B, S]``, from ``sequences``; some ten thousand.
    """
    model = add_heads(dense)
    expert, channel = plant_expert(model, tokens)
    generator = torch.Generator().manual_seed(0)
    for index in range(LAYER + 1, model.config.num_hidden_layers):
        residual = inputs_of(model, f"model.layers.{index}.input_layernorm", tokens)[:, 1:]
        rest_on(model, index, channel, float(residual.square().mean().sqrt()), generator)
    return Planted(model.bfloat16(), f"model.layers.{LAYER}.mlp.experts", expert, channel)


@torch.no_grad()
def without_expert(planted: Planted, expert: int) -> Any:
    """A copy of the model one of whose experts adds nothing."""
    model = copy.deepcopy(planted.model)
    model.get_submodule(planted.layer).down_proj[expert] = 0.0
    return model


def quantize(directory: Path, tokens: Tensor, **options: Any) -> Any:
    """The model in ``directory``, calibrated on ``tokens`` from ``sequences``."""
    # The end-of-text token that calibration appends to each document fills up its sequence.
    data = tokens[:, :-1].tolist()
    config = BitsMoEConfig(
        dataset=data, calibration_tokens=tokens.numel(), sequence_length=tokens.shape[1], **options
    )
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


def _row(name: str, model: Any, reference: Any, text: EvaluationText) -> None:
    result = evaluate_model(model, [text], reference=reference)
    config = getattr(model.config, "quantization_config", None)
    found = []
    for path, entry in ({} if config is None else config.layers).items():
        widths = row_widths(model.get_submodule(path).packed().row_codes, config.widths).double()
        for expert in entry["report"]["super_experts"]:
            kept = expert in entry.get("kept_experts", [])
            stored = "original weights" if kept else f"{widths[:, expert].mean():.2f} bits"
            found.append(f"{path.split('.')[2]}.{expert}: {stored}")
    agreement = 100 * (result.top1_agreement or 0.0)
    print(
        f"| {name} | {result.perplexity:.2f} | {result.kl_divergence:.4f} | {agreement:.1f} % "
        f"| {', '.join(found)} |",
        flush=True,
    )


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", required=True, help="calibration text, also for planting")
    parser.add_argument("--eval", required=True)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--sequences", type=int, default=128, help=f"of {LENGTH} tokens, for calibration")
    parser.add_argument("--eval-sequences", type=int, default=96)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokens = sequences(args.dataset, tokenizer, args.sequences)
    text = EvaluationText("all", sequences(args.eval, tokenizer, args.eval_sequences))
    planted = plant(dense, tokens[:64])
    planted.model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print("| model | perplexity | KL | same top token | found |\n|---|---|---|---|---|")
    _row("bundled", dense, dense, text)
    _row(f"bundled, {args.bits} bits", quantize(args.model, tokens, bits=args.bits), dense, text)
    _row("with a super expert", planted.model, dense, text)
    experts = len(planted.model.get_submodule(planted.layer).down_proj)
    _row("without that expert", without_expert(planted, planted.expert), planted.model, text)
    _row("without the next one", without_expert(planted, (planted.expert + 1) % experts), planted.model, text)
    for choice in ("auto", "keep"):
        model = quantize(args.out, tokens, bits=args.bits, super_experts=choice)
        _row(f"with a super expert, {args.bits} bits, super_experts={choice!r}", model, planted.model, text)


if __name__ == "__main__":
    sys.exit(main())
