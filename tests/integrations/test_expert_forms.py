"""The whole job on small random models whose experts are not those of most families."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_support import build, calibration, quantize
from forms_support import CAUSAL, MULTIMODAL, multimodal_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from triton_support import random_layer

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.codec.sharding import Shard, shard_shape, slice_packed
from bitsmoe_plugin.commands.compare.rtn import quantize_rtn
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.commands.inspect import inspect_checkpoint, print_inspection
from bitsmoe_plugin.commands.report.checkpoint_data import gather
from bitsmoe_plugin.integrations.dequantize_checkpoint import dequantize_checkpoint
from bitsmoe_plugin.models.families import find_moe_layers, layer_shape
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token")
BITS = 10
"""Counted, most of which bases and row codes of so small experts take."""


def experts_of(model: Any) -> list[BitsMoEExperts]:
    return [module for module in model.modules() if isinstance(module, BitsMoEExperts)]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def round_trip(model: Any, packed: Any, auto: Any, folder: Path) -> Any:
    """Save, load, dequantize in memory and from files; returns what was loaded."""
    tokens = calibration()
    packed.save_pretrained(folder / "packed")
    loaded = auto.from_pretrained(folder / "packed")
    assert len(experts_of(loaded)) == len(find_moe_layers(model))
    with torch.no_grad():
        first, second = (m(tokens[:2]).logits for m in (packed, loaded))
    assert torch.equal(first, second)
    assert loaded.generate(tokens[:1, :4], min_new_tokens=3, max_new_tokens=3).shape == (1, 7)
    dense = auto.from_pretrained(folder / "packed").dequantize()
    with torch.no_grad():
        assert relative(dense(tokens[:2]).logits, first) < 2e-5
    assert type(dense) is type(model)
    assert packed.num_parameters() == dense.num_parameters() == model.num_parameters()
    dense.save_pretrained(folder / "again")
    dequantize_checkpoint(folder / "packed", folder / "written")
    before, again, written = (
        load_file(folder / d / "model.safetensors") for d in ("dense", "again", "written")
    )
    assert before.keys() == again.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in again.items())
    return loaded


def check_layers(model: Any, packed: Any) -> None:
    """The outputs of each layer are near the original's on what it sees, norm and clamp included."""
    for layer in find_moe_layers(model):
        module, seen = packed.get_submodule(layer.name), []
        handle = module.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs))
        with torch.no_grad():
            packed(calibration()[:2])
            handle.remove()
            assert relative(module(*seen[0]), layer.module(*seen[0])) < 0.01


@pytest.mark.parametrize("form", CAUSAL)
def test_quantize_save_and_reload(form: str, tiny_model, tmp_path) -> None:
    """Guards all that assumes three matrices, experts alone to be 3-D, or ids below their number."""
    family, changes = CAUSAL[form]
    model = build(tiny_model, family, **changes)
    model.save_pretrained(tmp_path / "dense")
    packed = quantize(tmp_path / "dense", bits=BITS, compensation=False)
    loaded = round_trip(model, packed, AutoModelForCausalLM, tmp_path)
    tokens = calibration()
    with torch.no_grad():
        wanted, found = (m(tokens[:2]).logits for m in (model, loaded))
    assert relative(found, wanted) < 0.01
    check_layers(model, packed)
    shapes = {module.spec.shape.has_gate for module in experts_of(loaded)}
    assert shapes == {family != "nemotron_h"}
    # Counted as stored, and told so by all that count.
    stored = sum(
        8 * t.numel() * t.element_size() for m in experts_of(loaded) for _, t in m.packed().tensors()
    )
    weights = sum(layer.module.down_proj.numel() for layer in find_moe_layers(model))
    weights *= 3 if family != "nemotron_h" else 2
    assert stored / weights <= BITS
    report = inspect_checkpoint(tmp_path / "packed")
    assert report["bits_per_weight"] == pytest.approx(stored / weights)
    assert report["expert_weights"] == weights
    planned = estimate(tmp_path / "dense", BitsMoEConfig(bits=BITS, basis_group_size=16, compensation=False))
    assert planned.expert_weights == weights
    assert planned.expert_bytes == pytest.approx(stored / 8, rel=0.02)


@pytest.mark.parametrize("form", MULTIMODAL)
def test_multimodal_models(form: str, tmp_path) -> None:
    """A norm's weights are saved beside the packed experts; a clamp that differs between layers."""
    model = multimodal_model(form)
    model.save_pretrained(tmp_path / "dense")
    options = {"bits": BITS, "basis_group_size": 16, "compensation": False, "scope": "layer"}
    config = BitsMoEConfig(dataset=calibration().tolist(), sequence_length=32, **options)
    packed = AutoModelForMultimodalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    round_trip(model, packed, AutoModelForMultimodalLM, tmp_path)
    check_layers(model, packed)


def test_experts_without_a_gate_in_all_reports(tiny_model, tmp_path) -> None:
    """Guards tables and plots that have a row for a gate; budgets of projections; the baseline of compare."""
    model = build(tiny_model, "nemotron_h", **CAUSAL["no gate"][1])
    model.save_pretrained(tmp_path / "dense")
    options = {"bits": BITS, "projection_bits": {"down": 9}, "joint_basis": False}
    packed = quantize(tmp_path / "dense", super_experts={"model.layers.0.mixer.experts": [1]}, **options)
    packed.save_pretrained(tmp_path / "packed")
    report = inspect_checkpoint(tmp_path / "packed")
    assert report["projections"].keys() == {"up", "down"}
    assert report["projections"]["down"] == pytest.approx(9, abs=0.2)
    print_inspection(report, text := io.StringIO())
    assert "gate" not in text.getvalue()
    data = gather(tmp_path / "packed")
    assert data.factors == ("up", "down")
    assert data.layers[0].kept == (1,)
    assert data.layers[0].spectrum is not None
    assert data.layers[0].spectrum.shape == (2, 32)
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["layers"]
    assert all(layer["has_gate"] is False for layer in entry.values())
    quantize_rtn(model, 8, 16)
    with pytest.raises(Exception, match=r"projection_bits names gate, but the experts of .* have no gate"):
        quantize(tmp_path / "dense", bits=BITS, projection_bits={"gate": 3})


@pytest.mark.parametrize("form", ["no gate", "identity experts", "norm after each expert"])
def test_parts_of_processes_add_up(form: str, tiny_model) -> None:
    """Norms come after the sum over processes, and what passes through unchanged is added once: guards
    tensor parallelism, whose processes replace ``routed`` by the sum of their parts."""
    if form in MULTIMODAL:
        model = multimodal_model(form)
    else:
        model = build(tiny_model, CAUSAL[form][0], **CAUSAL[form][1])
    original = find_moe_layers(model)[0].module
    shape = replace(layer_shape(original), intermediate_size=64)
    spec, packed = random_layer(shape)
    whole = BitsMoEExperts(original, spec)
    whole.load_packed(packed)
    hidden = torch.randn(9, whole.spec.shape.hidden_size)
    index = torch.stack([torch.randperm(6 if form == "identity experts" else 4)[:3] for _ in range(9)])
    weights = torch.rand(9, 3)
    with torch.no_grad():
        wanted = whole(hidden, index, weights)
        parts = []
        for blocks in ((0, 1), (1, 2)):
            shard = Shard((0, 1, 2, 3), blocks)
            part = slice_packed(packed, spec.widths, shape, shard)
            size = {"shape": shard_shape(shape, shard), "payload_words": part.payload.numel()}
            parts.append(BitsMoEExperts(original, replace(spec, **size)))
            parts[-1].whole_shape = shape
            parts[-1].load_packed(part)
        whole.routed = lambda *inputs: sum(part.routed(*inputs) for part in parts)
        assert relative(whole(hidden, index, weights), wanted) < 1e-4
