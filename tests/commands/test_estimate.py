"""The dry run against what quantization really stores, and its promise to read no weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families_support import off_convention
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitsmoe_plugin import BitsMoEConfig, BitsMoEError, CheckpointError, QuantizationError
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands import estimate_resources
from bitsmoe_plugin.commands.estimate import Estimate, estimate
from bitsmoe_plugin.commands.estimate_resources import KERNELS, Workload, peak_memory, rough_seconds
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.pipeline.layer_plan import plan_layer
from bitsmoe_plugin.spectral.layer_problem import build_problem

CONFIG = BitsMoEConfig(bits=2.0)
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def same_sizes(result: Estimate) -> Estimate:
    """Without the time, which is measured."""
    return replace(result, seconds=None)


@pytest.fixture
def description(moe_tiny_path: Path, tmp_path: Path) -> Path:
    """The bundled model as a directory with config.json and an index, but no weights."""
    shutil.copy(moe_tiny_path / "config.json", tmp_path)
    index = {"metadata": {"total_size": estimate(moe_tiny_path, CONFIG).unquantized_bytes}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_sizes_are_those_of_a_real_quantization(moe_tiny_path: Path, packed_moe_tiny: Path) -> None:
    """Guards the promise of 2 %: the bytes of the experts, part by part, and of the whole file. (The
    allocation leaves less than a row of its budget unspent, so the experts agree much better.)"""
    options = read_config(packed_moe_tiny).to_dict()
    for name in ("layers", "calibration", "other_tensors", "quant_method"):
        del options[name]
    result = estimate(moe_tiny_path, BitsMoEConfig(**options))
    real = inspect_checkpoint(packed_moe_tiny)
    assert result.expert_bytes == pytest.approx(real["expert_bytes"], rel=1e-4)
    assert result.expert_weights == real["expert_weights"]
    for part, bits in real["parts"].items():
        assert 8 * result.parts[part] / result.expert_weights == pytest.approx(bits, rel=1e-3)
    size = sum(path.stat().st_size for path in packed_moe_tiny.glob("*.safetensors"))
    assert result.checkpoint_bytes == pytest.approx(size, rel=0.02)


def test_index_alone_is_enough(moe_tiny_path: Path, description: Path) -> None:
    """Guards against reading shards, which need not have been downloaded."""
    assert same_sizes(estimate(description, CONFIG)) == same_sizes(estimate(moe_tiny_path, CONFIG))


def test_header_alone_is_enough(moe_tiny_path: Path, tmp_path: Path) -> None:
    """Guards against reading the weights of a single file: here it ends after its header."""
    shutil.copy(moe_tiny_path / "config.json", tmp_path)
    with (moe_tiny_path / "model.safetensors").open("rb") as file:
        length = file.read(8)
        (tmp_path / "model.safetensors").write_bytes(length + file.read(struct.unpack("<Q", length)[0]))
    assert same_sizes(estimate(tmp_path, CONFIG)) == same_sizes(estimate(moe_tiny_path, CONFIG))


def test_dtype_is_told_by_the_size_if_the_config_names_none(description: Path, moe_tiny_path: Path) -> None:
    """Guards against taking 16-bit weights for float32, which is what transformers builds by default."""
    path = description / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": None}))
    result = estimate(description, CONFIG)
    assert result.other_bytes == estimate(moe_tiny_path, CONFIG).other_bytes
    assert result.memory["model"] + 4 * result.memory["experts"] == result.unquantized_bytes  # 4 layers


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "olmoe", "granitemoe"])
def test_experts_and_the_rest_are_the_whole_model(
    family: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Guards what counts as an expert (not shared ones, not the router) in families whose files hold
    experts one by one under other names."""
    tiny_model(family).save_pretrained(tmp_path)
    result = estimate(tmp_path, BitsMoEConfig(bits=8.0))
    assert result.other_bytes + 4 * result.expert_weights == result.unquantized_bytes
    assert result.expert_weights == result.experts * 3 * 32 * 16


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_biases_and_named_kept_experts_are_counted(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Guards the sizes of a model that stores more than rows and bases; and what is refused."""
    model = tiny_model("gpt_oss", layer_types=["full_attention"] * 2)
    model.save_pretrained(tmp_path / "dense")
    options = {"super_experts": {"model.layers.1.mlp.experts": [2, 0]}, "basis_group_size": 16}
    tokens = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(1)).tolist()
    config = BitsMoEConfig(bits=12, sequence_length=32, dataset=tokens, **options)
    result = estimate(tmp_path / "dense", config)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    real = inspect_checkpoint(tmp_path / "packed")
    for part in ("biases", "kept_experts", "bases", "row_codes", "scale_grids"):
        assert 8 * result.parts[part] / result.expert_weights == pytest.approx(real["parts"][part])
        assert result.parts[part] > 0
    assert result.expert_bytes == pytest.approx(real["expert_bytes"], rel=0.01)
    with pytest.raises(QuantizationError, match=f"smallest reachable is {result.smallest_bits:.4f}"):
        estimate(tmp_path / "dense", BitsMoEConfig(bits=result.smallest_bits - 0.01, basis_group_size=16))
    wrong = BitsMoEConfig(bits=12, super_experts={"model.layers.1.mlp.experts": [4]}, basis_group_size=16)
    with pytest.raises(QuantizationError, match=r"which the model lacks"):
        estimate(tmp_path / "dense", wrong)


def test_smallest_bits_are_reachable_and_less_is_refused(moe_tiny_path: Path) -> None:
    """Guards against two notions of the smallest budget."""
    for option in ("bits", "factor_bits"):
        given = BitsMoEConfig(**{option: 4.0}, widths=(1, 2, 4))
        smallest = estimate(moe_tiny_path, given).smallest_bits
        assert same_sizes(
            estimate(moe_tiny_path, BitsMoEConfig(**{option: smallest + 1e-9}, widths=(1, 2, 4)))
        )
        with pytest.raises(QuantizationError, match=f"smallest reachable is {smallest:.4f}"):
            estimate(moe_tiny_path, BitsMoEConfig(**{option: smallest - 1e-4}, widths=(1, 2, 4)))


def test_factor_bits_leave_the_bases_out(moe_tiny_path: Path) -> None:
    """Guards the count: bits per weight as reported always include the bases."""
    result = estimate(moe_tiny_path, BitsMoEConfig(factor_bits=2.0))
    assert result.bits_per_weight == pytest.approx(
        2.0 + 8 * result.parts["bases"] / result.expert_weights, abs=1e-5
    )


def test_plan_in_memory_is_that_of_a_layer(make_layer: Callable[..., Any]) -> None:
    """Guards the memory of a plan, whatever the depth of the model, against the real tensors;
    scales of the bases, a few per cent, are not counted."""
    layer = make_layer(experts=6, size=32, hidden=64, tokens=200)
    problem = build_problem("layer", layer.weights, layer.activations, layer.gating, CONFIG)
    plan = plan_layer(problem, 2 * layer.weights.numel())
    bases = [basis.codes for basis in (plan.bases.input_basis, plan.bases.output_basis)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (plan.costs, plan.energies, *bases))
    work = partial(Workload, tokens=0, experts_per_token=2, other_bytes=0, active_weights=0, itemsize=2)
    memory = peak_memory(work(shapes=[LayerShape(6, 64, 32)] * 3), CONFIG)
    assert memory["plan"] == held


def test_activations_take_memory_by_the_token(moe_tiny_path: Path) -> None:
    """Guards that calibration_tokens is what counts, not its default: T x H values, 7 of the model's dtype
    and 2 of float32."""
    memory = estimate(moe_tiny_path, BitsMoEConfig(calibration_tokens=1_000)).memory
    assert memory["activations"] == 1_000 * 128 * (7 * 2 + 2 * 4)


def test_compiled_kernels_are_bounded() -> None:
    """Guards against a term that grows without end with the calibration text: two products per expert and
    batch, at most ``KERNELS``."""
    work = partial(Workload, [LayerShape(40, 64, 32)], experts_per_token=2, other_bytes=0, active_weights=0)
    batch = CONFIG.sequence_length * CONFIG.batch_size
    one = peak_memory(work(tokens=batch, itemsize=2), CONFIG)["kernels"]
    endless = peak_memory(work(tokens=10**9, itemsize=2), CONFIG)["kernels"]
    assert endless * 80 == one * KERNELS


def _dense(path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2)).save_pretrained(path)


def _off_convention(path: Path) -> None:
    off_convention().save_pretrained(path)


def _edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _write_index(path: Path, text: str) -> None:
    (path / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"config\.json does not exist"),
        (lambda path: (path / "model.safetensors.index.json").unlink(), "has neither"),
        (lambda path: _write_index(path, "{}"), "has no total_size"),
        (lambda path: _write_index(path, "not JSON"), "index.json cannot be read"),
        (lambda path: _write_index(path, '{"metadata": {"total_size": "many"}}'), "has no total_size"),
        (lambda path: _write_index(path, '{"metadata": {"total_size": -1}}'), "has no total_size"),
        (lambda path: _write_index(path, '{"metadata": {}, "metadata": {"total_size": 1}}'), "twice"),
        (lambda path: _write_index(path, '{"metadata": {"total_size": 1000000}}'), "do not belong together"),
        (lambda path: _edit_config(path, model_type="no_such_model"), "no_such_model"),
        (lambda path: _edit_config(path, hidden_size="wide"), r"config\.json cannot be used.*hidden_size"),
        (
            lambda path: _edit_config(path, quantization_config={"quant_method": "gptq"}),
            "'gptq'.*no operation",
        ),
        (lambda path: _edit_config(path, quantization_config={"bits": 4}), "has no quant_method"),
        (_dense, "'llama' has no MoE layers"),
        (_off_convention, r"'jetmoe' cannot be quantized.*JetMoeMoE"),
    ],
)
def test_bad_input_is_refused(damage: Callable[[Path], None], message: str, description: Path) -> None:
    """Guards against estimates of what could not be quantized, with the errors that quantization gives."""
    damage(description)
    if (description / "model.safetensors").exists():
        (description / "model.safetensors.index.json").unlink()
    with pytest.raises(BitsMoEError, match=message):
        estimate(description, CONFIG)


def test_file_that_is_no_safetensors_is_refused(description: Path) -> None:
    """Guards against allocating what the first eight bytes of any file happen to say."""
    (description / "model.safetensors.index.json").unlink()
    headers = (
        b"[1, 2, 3] ",
        b"[" * 100_000,
        b'{"a": {}, "a": {}}',
        b'{"a": {"shape": [2]}}',
        b'{"a": {"shape": [2], "data_offsets": [0]}}',
        b'{"a": {"shape": [2], "data_offsets": [0, -1]}}',
    )
    files = [b"", b"PK\x03\x04" + bytes(range(100))]
    for content in files + [struct.pack("<Q", len(header)) + header for header in headers]:
        (description / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            estimate(description, CONFIG)


def test_packed_checkpoint_is_refused(packed_moe_tiny: Path) -> None:
    """Guards against quantizing twice on paper."""
    with pytest.raises(QuantizationError, match="quantized already"):
        estimate(packed_moe_tiny, CONFIG)


def test_no_weight_is_allocated(description: Path) -> None:
    """Guards the dry run's own memory: a model of 10^13 weights is estimated like any other."""
    size = {"hidden_size": 2**14, "moe_intermediate_size": 2**14, "num_local_experts": 2**12}
    _edit_config(description, **size)
    _write_index(description, json.dumps({"metadata": {"total_size": 2 * 4 * 3 * 2**40 + 10**10}}))
    result = estimate(description, CONFIG)
    assert result.expert_weights == 4 * 3 * 2**40
    assert 4 * result.memory["experts"] == 2 * result.expert_weights


def test_showing_all_tokens_to_all_experts_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards users of ``all_experts`` against the estimate of a run without it."""
    monkeypatch.setattr(estimate_resources, "_matmul_speed", lambda: 1e11)
    shapes = [LayerShape(40, 64, 32)]
    work = partial(Workload, shapes, experts_per_token=2, other_bytes=0, active_weights=0, itemsize=2)
    shown = BitsMoEConfig(all_experts=True)
    assert peak_memory(work(tokens=1000), CONFIG)["shown"] == 0
    assert (
        peak_memory(work(tokens=2000), shown)["shown"]
        == 2 * peak_memory(work(tokens=1000), shown)["shown"]
        > 0
    )
    few, many = (rough_seconds(work(tokens=10**5), config) for config in (CONFIG, shown))
    assert few is not None
    assert many is not None
    assert many > few


def test_memory_of_a_layer_grows_with_its_experts_by_what_is_packed_of_them() -> None:
    """Guards layers of hundreds of large experts: only the experts themselves, their plan and their packed
    rows may take memory for each."""
    work = partial(Workload, tokens=4096, experts_per_token=8, other_bytes=0, active_weights=0, itemsize=2)
    few, many = (peak_memory(work([LayerShape(n, 7168, 2048)]), CONFIG) for n in (16, 384))
    weights = 368 * 3 * 7168 * 2048
    assert many["layer"] - few["layer"] == pytest.approx(CONFIG.bits * weights / 8, rel=1e-6)
    assert many["experts"] - few["experts"] == 2 * weights
