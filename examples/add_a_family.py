"""Quantize a model class of your own.

1. Experts that follow the fused convention of transformers and declare it (one decorator) need nothing.
2. Experts that deviate are refused by name. If you cannot change their class, one entry in
   ``bitsmoe_plugin.models.families.UNDECLARED`` says how they deviate.

Run it from the root of the repository (seconds); the model is random and tiny.
"""

# %%
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import use_experts_implementation

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.models import families

TOKENS = torch.randint(0, 512, (32, 64), generator=torch.Generator().manual_seed(0)).tolist()


# %% A family of your own: here Qwen3's attention, with experts and a router that Qwen3 does not have.
class SquareReluConfig(Qwen3MoeConfig):
    model_type = "square_relu_moe"


@use_experts_implementation  # declares: gate above up, not transposed, no biases, with a gate
class SquareReluExperts(nn.Module):
    """``gate_up_proj [E, 2I, H]``, ``down_proj [E, H, I]``; called with hidden states, experts, weights."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        size, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.randn(config.num_experts, 2 * size, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(config.num_experts, hidden, size) / size**0.5)

    def _apply_gate(self, gate_up):  # found by transformers and by us; without it, act_fn(gate) * up
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.relu().square() * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(len(self.down_proj)):
            token, slot = torch.where(top_k_index == expert)
            h = self._apply_gate(hidden_states[token] @ self.gate_up_proj[expert].T)
            out.index_add_(0, token, h @ self.down_proj[expert].T * top_k_weights[token, slot, None])
        return out


class SigmoidRoutedBlock(nn.Module):
    """Routers are not quantized, so any will do."""

    def __init__(self, config, experts):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = experts(config)

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        weights, index = self.gate(flat).sigmoid().topk(self.top_k, dim=-1)
        return self.experts(flat, index, weights).view_as(hidden_states)


class SquareReluForCausalLM(Qwen3MoeForCausalLM):
    config_class = SquareReluConfig
    experts = SquareReluExperts

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = SigmoidRoutedBlock(config, self.experts)
        self.post_init()


AutoConfig.register("square_relu_moe", SquareReluConfig)
AutoModelForCausalLM.register(SquareReluConfig, SquareReluForCausalLM)


def quantize(model) -> None:
    """Save it, quantize it while it is loaded, save it packed, load it packed."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/dense")
        config = BitsMoEConfig(bits=3.0, dataset=TOKENS, sequence_length=64)
        packed = AutoModelForCausalLM.from_pretrained(f"{directory}/dense", quantization_config=config)
        packed.save_pretrained(f"{directory}/packed")
        again = AutoModelForCausalLM.from_pretrained(f"{directory}/packed")
        layers = inspect_checkpoint(Path(directory, "packed"))["layers"].values()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(TOKENS)).logits, packed(torch.tensor(TOKENS)).logits)
    errors = [f"{layer['calibration_error'] / layer['output_energy']:.1%}" for layer in layers]
    print(f"{type(again).__name__} at 3 bits, loaded again; output errors of its layers: {', '.join(errors)}")


SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
SIZES |= {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}

# %% 1. It follows the convention, so it works as it is.
quantize(SquareReluForCausalLM(SquareReluConfig(**SIZES, head_dim=32)))


# %% 2. The same with weights stored the other way round, which the class does not declare.
class TransposedExperts(nn.Module):
    """Somebody else's: ``gate_up_proj [E, H, 2I]`` and ``down_proj [E, I, H]``, without the decorator."""

    _apply_gate = SquareReluExperts._apply_gate

    def __init__(self, config):
        super().__init__()
        size, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.randn(config.num_experts, hidden, 2 * size) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(config.num_experts, size, hidden) / size**0.5)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(len(self.down_proj)):
            token, slot = torch.where(top_k_index == expert)
            h = self._apply_gate(hidden_states[token] @ self.gate_up_proj[expert])
            out.index_add_(0, token, h @ self.down_proj[expert] * top_k_weights[token, slot, None])
        return out


SquareReluForCausalLM.experts = TransposedExperts
transposed = SquareReluForCausalLM(SquareReluConfig(**SIZES, head_dim=32))
try:
    quantize(transposed)
except QuantizationError as error:
    print(f"refused: {error}")

# %% The entry: class name -> how it deviates. For a family that others use too, send it to us as a line of
# families.py; in your own script it has to stand where the model is quantized and where it is loaded. A
# wrong entry does no harm: what the module computes is compared with what the entry says. (Classes that you
# can change are better declared: @use_experts_implementation(is_transposed=True).)
families.UNDECLARED["TransposedExperts"] = families.Layout(is_transposed=True)
quantize(transposed)
