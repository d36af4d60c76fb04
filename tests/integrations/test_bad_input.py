"""Bad input gets one clear error (or a warning and a safe result) and leaves nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from families_support import off_convention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitsmoe_plugin import BitsMoEConfig, ConfigError, QuantizationError
from bitsmoe_plugin.allocation.budget import plan_budget
from bitsmoe_plugin.codec.layout import LayerShape, fixed_bits, row_widths
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline import quantize_model

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "moe-tiny")
CALIBRATION = str(EXAMPLES / "data" / "calibration.jsonl")
SMALL = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def _config(**changes) -> BitsMoEConfig:
    return BitsMoEConfig(
        **{"dataset": CALIBRATION, "calibration_tokens": 4096, "sequence_length": 128, **changes}
    )


def _quantize(path, **changes):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=_config(**changes))


def _save(model, path: Path) -> Path:
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return path


def test_dense_model_is_refused(tmp_path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2))
    with pytest.raises(QuantizationError, match="'llama' has no MoE layers"):
        _quantize(_save(model, tmp_path))


def test_family_off_the_convention_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(QuantizationError, match=r"'jetmoe' cannot be quantized.*JetMoeMoE"):
        _quantize(_save(off_convention(), tmp_path))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "dataset is empty"),
        (["too short"], "fewer than one sequence of 128"),
        ("missing.jsonl", r"missing\.jsonl does not exist"),
        ([[5000] * 300], "token id 5000"),
        ([1.5, "x"], "mixes types"),
        (7, "dataset is a int"),
    ],
)
def test_unusable_dataset_is_refused(dataset, message) -> None:
    with pytest.raises(QuantizationError, match=message):
        _quantize(MODEL, dataset=dataset)


def test_missing_dataset_is_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match="dataset=None is not allowed"):
        _quantize(MODEL, dataset=None)


def test_unreachable_budget_names_the_smallest(tmp_path) -> None:
    with pytest.raises(QuantizationError, match=r"smallest reachable is 0\.2"):
        _quantize(MODEL, bits=0.1)


def test_nan_weights_name_the_layer(tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3, 5, 7] = torch.nan
    with pytest.raises(QuantizationError, match=r"model\.layers\.2\.mlp\.experts: NaN or infinity in down"):
        _quantize(_save(model, tmp_path))


def test_unrouted_expert_gets_a_warning_and_typical_widths(tmp_path) -> None:
    """Allocation must not starve an expert for lack of evidence."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():  # its logit is the mean of all others: never among the four largest
        router = model.model.layers[1].mlp.gate.weight
        router[9] = router[torch.arange(48) != 9].float().mean(0).to(router.dtype)
    with pytest.warns(UserWarning, match=r"layers\.1.*no calibration token was routed to expert 9\b"):
        packed = _quantize(_save(model, tmp_path))
    experts = packed.model.layers[1].mlp.experts
    bits = row_widths(experts.packed().row_codes, experts.spec.widths).float().mean((0, 2))
    assert bits[9] > 0.7 * bits.median()
    assert torch.isfinite(packed(torch.arange(64)[None]).logits).all()


def test_output_directory_in_use_is_refused_and_untouched(tmp_path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(QuantizationError, match="not empty"):
        quantize_to_directory(MODEL, tmp_path, _config())
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_failure_while_saving_leaves_no_checkpoint(tmp_path, monkeypatch) -> None:
    """A checkpoint directory is complete or absent."""
    from transformers import PreTrainedModel

    def full_disk(self, directory, **kwargs):
        (Path(directory) / "config.json").write_text(json.dumps({}))
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    with pytest.raises(QuantizationError, match=r"out cannot be written \(No space left.*make room"):
        quantize_to_directory(MODEL, tmp_path / "out", _config())
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.work"]  # the finished layers, to go on with


def test_factor_bits_leave_the_bases_out_of_the_budget() -> None:
    """Two ways of counting must not be mixed up: everything, or everything but the bases."""
    shape = LayerShape(num_experts=4, hidden_size=64, intermediate_size=64)
    fixed = fixed_bits(shape, 4, 32, 1)
    everything = plan_budget([shape], BitsMoEConfig(bits=3.0)).payload_bits
    factors = plan_budget([shape], BitsMoEConfig(bits=0.1, factor_bits=3.0)).payload_bits
    assert factors - everything == fixed["bases"]
    with pytest.raises(QuantizationError, match=r"factor_bits=0\.1 cannot be met"):
        plan_budget([shape], BitsMoEConfig(factor_bits=0.1, widths=(1, 2)))


@pytest.mark.parametrize("layer", [0, 2])
def test_overflow_names_the_layer_where_it_happens(tmp_path, layer: int) -> None:
    """Finite weights, infinite outputs: not the layer after it, which sees them first."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.mul_(1e38)
    with pytest.raises(QuantizationError, match=rf"model\.layers\.{layer}\.mlp\.experts: NaN or infinity"):
        _quantize(_save(model, tmp_path))


def test_overflow_of_a_dense_layer_names_it(tiny_model) -> None:
    model = tiny_model("deepseek_v3")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = torch.inf
    with pytest.raises(QuantizationError, match="decoder layer 0 puts out NaN or infinity"):
        quantize_model(model, torch.randint(1, 64, (8, 32)), BitsMoEConfig(bits=8, basis_group_size=16))
