"""Linear layers outside the experts in 8 or 4 bits: quantized, saved, loaded, dequantized, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_support import ALTERED, LAYER, REFUSED
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.base.sizes import size_in_bytes
from bitsmoe_plugin.checkpoint.read import read_config as report_config
from bitsmoe_plugin.codec.dense import dense_schemes
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.errors import BitsMoEError, CheckpointError, ConfigError, QuantizationError
from bitsmoe_plugin.integrations.dequantize_checkpoint import dequantize_checkpoint
from bitsmoe_plugin.pipeline import dense_pass
from bitsmoe_plugin.spectral.error_feedback import damping

OPTIONS: dict[str, Any] = {"method": "fast", "calibration_tokens": 1024, "sequence_length": 256}
MIXED = {"o_proj": 8, "self_attn": 4}


def quantized(path: Path, **options: Any) -> Any:
    text = str(path.parent / "data" / "calibration.jsonl")
    config = BitsMoEConfig(**{"dataset": text, **OPTIONS, **options})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.fixture(scope="module")
def in_memory(moe_tiny_path: Path) -> Any:
    return quantized(moe_tiny_path, dense_bits=MIXED)


@pytest.fixture(scope="module")
def packed(in_memory: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "model"
    in_memory.save_pretrained(out)
    return out


def test_saved_model_is_the_one_in_memory_and_is_saved_to_the_same_bytes(
    in_memory: Any, packed: Path, tmp_path: Path
) -> None:
    """Guards against codes that are rounded anew on saving, and layers that are saved unpacked."""
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(loaded), logits(in_memory))
    assert loaded.num_parameters() == in_memory.num_parameters()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    assert (tmp_path / "config.json").read_text() == (packed / "config.json").read_text()
    tensors = load_file(packed / "model.safetensors")
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(f"{LAYER}.")}
    assert shapes[f"{LAYER}.q_proj.weight_packed"] == (128, 16)
    assert shapes[f"{LAYER}.o_proj.weight_packed"] == (128, 32)
    assert f"{LAYER}.q_proj.weight" not in shapes


def test_thin_calibration_damps_them_more(moe_tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against second moments of few tokens that are inverted as if they were known well."""
    found, exact = set(), dense_pass.round_linear

    def watched(weight: torch.Tensor, *given: Any) -> Any:
        found.add((weight.shape[1], given[2]))
        return exact(weight, *given)

    monkeypatch.setattr(dense_pass, "round_linear", watched)
    quantized(moe_tiny_path, dense_bits=MIXED, calibration_tokens=128, sequence_length=64)
    assert {(128, 0.1)} <= found
    assert all(share == pytest.approx(damping(BitsMoEConfig(), 128, inputs)) for inputs, share in found)


def test_stored_layer_is_what_the_library_reads(packed: Path) -> None:
    """Guards against a format of our own: compressed-tensors alone must read layers and section."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    section = json.loads((packed / "config.json").read_text())["quantization_config"]["dense"]
    groups = QuantizationConfig.model_validate(section).config_groups
    scheme = next(group for group in groups.values() if f"{LAYER}.q_proj" in group.targets)
    tensors = load_file(packed / "model.safetensors")
    own = {name.rpartition(".")[2]: t for name, t in tensors.items() if f"{LAYER}.q_proj." in name}
    weight = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(model.get_submodule(f"{LAYER}.q_proj").weight, weight)


def test_dequantized_checkpoint_and_model_compute_the_same_weights(packed: Path, tmp_path: Path) -> None:
    """Guards against dense models that miss the layers, or have them as codes."""
    dequantize_checkpoint(packed, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.dequantize()
    assert torch.equal(logits(model), logits(dense))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert f"{LAYER}.q_proj.weight" in file.keys()  # noqa: SIM118 (it is no dict)


def test_dequantized_checkpoint_in_float32_is_not_rounded_before(packed: Path, tmp_path: Path) -> None:
    """Guards the products of codes and scales against bfloat16, in which the scales are stored."""
    dequantize_checkpoint(packed, tmp_path / "dense", "float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    for name in (f"{LAYER}.q_proj", f"{LAYER}.o_proj"):
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_changed_weight_is_not_saved_rounded(packed: Path, tmp_path: Path) -> None:
    """Guards against training, or merged adapters, that saving loses without a word."""
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.requires_grad_(True)
    weight = model.get_submodule(f"{LAYER}.k_proj").weight
    assert not weight.requires_grad
    weight.data[3, 5] += 0.01
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_proj: the weight has changed"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ALTERED)
def test_altered_layers_are_refused_by_transformers_and_commands(
    kind: str, packed: Path, tmp_path: Path
) -> None:
    """Guards against codes of other widths, and scales that make every output NaN."""
    altered = shutil.copytree(packed, tmp_path / "altered")
    ALTERED[kind](altered)
    with pytest.raises(CheckpointError, match=REFUSED):
        AutoModelForCausalLM.from_pretrained(altered)
    with pytest.raises(CheckpointError, match=REFUSED):
        dequantize_checkpoint(altered, tmp_path / "dense")


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ({"q_proj": 4}, r"q_proj 4, .*k_proj 16, .*computes as one layer"),
        ({"gate": 8}, r"names 'gate', but the model has no such linear layer"),
        ({"lm_head": 8}, r"lm_head, which is the same tensor as the embeddings"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_calibration(
    bits: dict[str, int], said: str, moe_tiny_path: Path
) -> None:
    """Guards against hours of work for a checkpoint that vLLM cannot serve."""
    with pytest.raises(ConfigError, match=said):
        quantized(moe_tiny_path, dense_bits=bits)


def test_interrupted_run_goes_on_to_the_same_bytes(packed: Path, moe_tiny_path: Path, tmp_path: Path) -> None:
    """Guards against layers that a run that goes on leaves unquantized, or quantizes twice."""
    from bitsmoe_plugin.pipeline import dense_pass, round_pass

    real, calls = dense_pass.round_dense, []

    def failing(run: Any, index: int, *given: Any) -> Any:
        calls.append(index)
        if index == 2:
            raise KeyboardInterrupt
        return real(run, index, *given)

    options = {"dense_bits": MIXED, "work_dir": str(tmp_path / "work")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_pass, "round_dense", failing)
        with pytest.raises(KeyboardInterrupt):
            quantized(moe_tiny_path, **options)
    assert calls == [0, 1, 2]
    quantized(moe_tiny_path, **options).save_pretrained(tmp_path / "model")
    written = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert written == (packed / "model.safetensors").read_bytes()


def test_head_and_shared_experts_of_another_family(tiny_model: Any, tmp_path: Path) -> None:
    """Guards against a head that is forgotten, routers that are rounded, and float32 models whose scales no
    reader in bfloat16 has."""
    sizes = {"hidden_size": 64, "vocab_size": 64, "shared_expert_intermediate_size": 32}
    plain = tiny_model("qwen2_moe", layer_types=["full_attention"] * 2, **sizes)
    plain.save_pretrained(tmp_path / "model")
    tokens = [torch.randint(64, (64,)).tolist() for _ in range(8)]
    options = {"method": "fast", "dataset": tokens, "sequence_length": 32}
    config = BitsMoEConfig(bits=6.0, dense_bits={"lm_head": 4, "*": 4}, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    names = set(load_file(tmp_path / "packed" / "model.safetensors"))
    stored = {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")}
    assert "lm_head" in stored
    assert "model.layers.0.mlp.shared_expert.down_proj" in stored
    assert "model.layers.0.mlp.gate.weight" in names
    assert "model.layers.0.mlp.shared_expert_gate.weight" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    scales = model.lm_head.bitsmoe_scales
    assert torch.equal(scales.bfloat16().float(), scales)


def test_size_is_kept_and_better_widths_cost_less(moe_tiny_path: Path, tmp_path: Path) -> None:
    """Guards against a size that files exceed or leave unused, and parts that do not add up to them."""
    size = 2_600_000
    quantized(moe_tiny_path, size=size).save_pretrained(tmp_path / "model")
    written = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert 0.99 * size < written <= size
    report = inspect_checkpoint(tmp_path / "model")
    assert 0.98 * written < report["total_bytes"] < written
    assert sum(part["bytes"] for part in report["by_part"].values()) == report["total_bytes"]
    assert report["total_weights"] == AutoModelForCausalLM.from_pretrained(moe_tiny_path).num_parameters()
    assert {"attention", "selected experts", "bases of the experts", "head"} == set(report["read_per_token"])
    bits = {scheme.bits for scheme in dense_schemes(report_config(tmp_path / "model").dense).values()}
    assert bits <= {4, 8}
    assert estimate(moe_tiny_path, BitsMoEConfig(size=size)).choices.keys() == {4, 8, 16}


@pytest.fixture(scope="module")
def untied(moe_tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a head of its own, a third of all bytes that are not experts."""
    model = AutoModelForCausalLM.from_pretrained(moe_tiny_path)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    data = tmp_path_factory.mktemp("untied")
    model.save_pretrained(data / "model")
    AutoTokenizer.from_pretrained(moe_tiny_path).save_pretrained(data / "model")
    shutil.copytree(moe_tiny_path.parent / "data", data / "data")
    return data / "model"


@pytest.mark.parametrize(
    ("table", "head", "others"),
    [(16, {4, 8}, {4, 8}), ({"lm_head": 16}, set(), {4, 8}), ({"self_attn": 8}, {4, 8}, {8})],
)
def test_size_chooses_for_what_a_table_leaves_open(
    table: Any, head: set[int], others: set[int], untied: Path, tmp_path: Path
) -> None:
    """Guards against a head that stays in 16 bits whatever it takes, and a table that a size overrides."""
    size = 3_000_000
    model = quantized(untied, size=size, dense_bits=table)
    model.save_pretrained(tmp_path)
    assert 0.99 * size < (tmp_path / "model.safetensors").stat().st_size <= size
    schemes = dense_schemes(report_config(tmp_path).dense)
    assert {schemes.pop("lm_head").bits} <= head if head else "lm_head" not in schemes
    assert {scheme.bits for scheme in schemes.values()} <= others
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_cost_of_a_head_grows_with_the_square_of_its_error(untied: Path) -> None:
    """Guards against a unit that rounding of logits, or the noise that it is measured by, decides: between 4
    and 8 bits errors fall to a sixteenth or less."""
    from bitsmoe_plugin.pipeline import plan_pass

    found: list[Any] = []
    real = plan_pass.head_costs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_pass, "head_costs", lambda run: found.append(real(run)) or found[-1])
        quantized(untied, size=3_000_000)
    ((four, finer, eight, none),) = found[0]
    assert none == 0 < 60 * eight < finer < four < 0.1


def test_size_out_of_reach_names_the_smallest_which_is_reached(moe_tiny_path: Path) -> None:
    """Guards against a message that sends the user to another refusal."""
    said = r"size=1MB cannot be met: the smallest is 1\.\d{3} MB"
    with pytest.raises(QuantizationError, match=said) as error:
        estimate(moe_tiny_path, BitsMoEConfig(size="1MB"))
    least = str(error.value).partition("the smallest is ")[2].partition(",")[0]
    assert estimate(moe_tiny_path, BitsMoEConfig(size=least)).bits_per_weight < 0.3
    cache = 2 * 4 * 2 * 2 * 32 * 1024  # values of keys and values in 16 bits: 4 layers, 2 heads of 32
    whole = estimate(moe_tiny_path, BitsMoEConfig(fit=3_000_000 + cache, fit_context=1024))
    assert whole.choices == estimate(moe_tiny_path, BitsMoEConfig(size=3_000_000)).choices


@pytest.mark.parametrize(
    "other", [{"fit": "3MB"}, {"layer_bits": {"a": 2}}, {"scope": "layer"}, {"widths": (0, 2, 4)}]
)
def test_size_with_another_budget_is_refused(other: dict[str, Any], moe_tiny_path: Path) -> None:
    """Guards against a budget that is silently ignored, or a refusal after hours of calibration."""
    with pytest.raises(ConfigError, match=r"not both|does not go with|must have as many"):
        estimate(moe_tiny_path, BitsMoEConfig(size="3MB", **other))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("11GB", 11 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("7kb", 7000),
        (12, 12),
        ("12", 12),
        ("-1GB", None),
        ("G", None),
    ],
)
def test_sizes_are_read_as_users_write_them(text: Any, size: int | None) -> None:
    """Guards against GiB that are taken for GB."""
    assert size_in_bytes(text) == size


def test_missing_library_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an ImportError from within."""
    from bitsmoe_plugin.runtime import dense_linear

    monkeypatch.setattr(dense_linear, "find_spec", lambda name: None)
    with pytest.raises(BitsMoEError, match=r"compressed-tensors; pip install"):
        AutoModelForCausalLM.from_pretrained(packed)
