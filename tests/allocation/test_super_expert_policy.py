"""Super experts, and experts that keep their weights: which they are, what they cost, what they compute."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.allocation import super_expert_policy
from bitsmoe_plugin.calibration import layerwise_forward
from bitsmoe_plugin.calibration.super_experts import ExpertOutputs, detect, forms_massive_activations, seen_by
from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.sharding import Shard, shard_kept, shard_shape, slice_packed
from bitsmoe_plugin.commands.inspect import inspect_checkpoint, print_inspection
from bitsmoe_plugin.errors import CheckpointError, QuantizationError
from bitsmoe_plugin.models.families import apply_gating, find_moe_layers
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.pipeline import dense_pass, plan_pass
from bitsmoe_plugin.runtime import dispatch

LAYER = "model.layers.1.mlp.experts"


def quantize(directory: Path, **options: Any) -> Any:
    tokens = torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    config = BitsMoEConfig(
        **{"bits": 8, "dataset": tokens.tolist(), "sequence_length": 32, **options}, basis_group_size=16
    )
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


@pytest.fixture
def dense(tiny_model, tmp_path) -> Path:
    """A saved model whose expert 2 of layer 1 has an output as super experts have it."""
    model = tiny_model("qwen3_moe", intermediate_size=32, moe_intermediate_size=32).bfloat16()
    experts = model.get_submodule(LAYER)
    experts.down_proj.data[2, 5] += 1e6 * torch.randn(32)
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_detection_follows_the_definition() -> None:
    """Above the percentile, above a tenth of the largest, in layers that form massive activations."""
    peaks = torch.ones(400)
    strong, near, other = peaks.clone(), peaks.clone(), peaks.clone()
    strong[[7, 9]], near[3], other[11] = 1000.0, 99.0, 500.0
    layers = [ExpertOutputs(strong, True), ExpertOutputs(near, True), ExpertOutputs(other, False)]
    assert detect(layers) == [(7, 9), (), ()]
    assert detect([ExpertOutputs(peaks, True)]) == [()]


def test_a_layer_that_only_passes_massive_activations_on_does_not_form_them() -> None:
    """Every layer behind a super expert sees its output in the residual stream."""
    calm = torch.randn(2, 4, 64)
    massive = calm.clone()
    massive[1, 1, 3] = 5000.0
    assert forms_massive_activations([calm], [massive])
    assert not forms_massive_activations([massive], [massive + calm])
    assert not forms_massive_activations([calm], [calm * 2])


def test_a_token_made_massive_is_seen_by_all_that_follow_in_its_block() -> None:
    """Itself included; also where blocks come in batches, or a token has several residual streams."""
    calm = torch.randn(3, 5, 2, 64)
    massive = calm.clone()
    massive[0, 0, 1, 3], massive[2, 3, 0, 9] = 5000.0, -3000.0
    wanted = torch.ones(3, 5)
    wanted[0, 0], wanted[2, 3] = 5, 2
    assert torch.equal(seen_by([calm], [massive]), wanted.flatten())
    assert torch.equal(seen_by(calm.split(1), massive.split(1)), wanted.flatten())
    assert torch.equal(seen_by([massive], [massive + calm]), torch.ones(15))  # passed on
    one = calm.clone()
    one[0, 0, 1, 3] = 5000.0
    wanted[0, 0] = 1  # its own massive activation was there before
    assert torch.equal(seen_by([one], [massive]), wanted.flatten())


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_a_planted_super_expert_is_found_kept_counted_and_reported(dense, tmp_path) -> None:
    """Its original weights are stored bit for bit, it computes the same, and the budget includes it."""
    original = AutoModelForCausalLM.from_pretrained(dense).get_submodule(LAYER)
    quantized = quantize(dense, super_experts="keep")
    quantized.save_pretrained(tmp_path / "packed")
    report = inspect_checkpoint(tmp_path / "packed")
    assert {name: layer["kept_experts"] for name, layer in report["layers"].items()} == {
        "model.layers.0.mlp.experts": [],
        LAYER: [2],
    }
    assert report["bits_per_weight"] <= 8
    # One of eight experts at 16 bits.
    assert report["parts"]["kept_experts"] == 2
    peaks = report["layers"][LAYER]["output_peaks"]
    assert peaks.index(max(peaks)) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    x, share = torch.randn(6, 32).bfloat16(), torch.full((6, 1), 0.5).bfloat16()
    only = torch.full((6, 1), 2)
    with torch.no_grad():
        wanted = original(x, only, share)
        modules = [model.get_submodule(LAYER) for model in (quantized, loaded)]
        for module in (*modules, copy.deepcopy(modules[1])):
            out = module(x, only, share)
            assert float((out - wanted).norm() / wanted.norm()) < 2e-2  # bfloat16
            assert torch.equal(module.packed().kept_output.view(torch.bfloat16)[0], original.down_proj[2])
            assert torch.equal(
                module.packed().kept_input.view(torch.bfloat16)[0].flatten(0, 1), original.gate_up_proj[2]
            )
        both = torch.tensor([[2, 0]] * 6)
        ids = torch.randint(1, 64, (2, 16))
        assert torch.equal(quantized(ids).logits, loaded(ids).logits)
        single = modules[0](x, both[:, 1:], share).float()
        together = modules[0](x, both, share.expand(6, 2)).float()
        assert float((together - single - wanted.float()).norm() / wanted.float().norm()) < 2e-2


def row_widths(model: Any, layer: str, expert: int) -> torch.Tensor:
    """``[3, r]`` bits of an expert's rows."""
    codes = model.get_submodule(layer).packed().row_codes
    return layout.row_widths(codes, model.config.quantization_config.widths)[:, expert]


def _tokens(stream: torch.Tensor) -> int:
    return stream.shape[0] * stream.shape[1]


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"layer_bits": {LAYER: 7}}, {"widths": [0, 2, 4], "bits": 4}]
)
def test_what_is_found_gets_wider_rows_from_the_program(dense, tmp_path, monkeypatch, options) -> None:
    """Since tokens that it makes massive count for all that attend to them; all is counted and reported."""
    # Whether its layer errs by more than it puts out on tokens held out is a matter of chance.
    options = {"bits": 6, "allow_thin": True, **options}
    model = quantize(dense, **options)
    model.save_pretrained(tmp_path / "packed")
    report = inspect_checkpoint(tmp_path / "packed")
    layer = report["layers"][LAYER]
    assert (layer["super_experts"], layer["kept_experts"]) == ([2], [])
    means = [float(row_widths(model, LAYER, e)[2].float().mean()) for e in range(4)]  # of down, which is huge
    assert means[2] == max(means) > max(means[:2] + means[3:])
    assert report["bits_per_weight"] <= options["bits"]
    monkeypatch.setattr(layerwise_forward, "seen_by", lambda _, after: torch.ones(sum(map(_tokens, after))))
    alike = row_widths(quantize(dense, **options), LAYER, 2)[2].float().mean()
    assert means[2] > float(alike)
    stream = io.StringIO()
    print_inspection(report, stream)
    mean = f"{layer['expert_bits'][2]:.3g}"
    assert f"super expert in rows of {mean} bits: {LAYER}, expert 2" in stream.getvalue()


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("weighting", ["residual", "none"])
def test_linear_layers_are_fitted_to_what_experts_beside_them_are(dense, monkeypatch, weighting: str) -> None:
    """Guards against tokens that a layer makes massive, which count for its experts and not for the rest."""
    seen: dict[str, dict[int, torch.Tensor]] = {"experts": {}, "linear": {}}
    capture, moments = plan_pass.capture_layer, dense_pass.input_moments

    def watched_capture(forward, index, *given):
        activations, outputs = capture(forward, index, *given)
        seen["experts"][index] = activations.token_weights
        return activations, outputs

    def watched_moments(forward, index, modules, weights):
        seen["linear"][index] = weights
        return moments(forward, index, modules, weights)

    monkeypatch.setattr(plan_pass, "capture_layer", watched_capture)
    monkeypatch.setattr(dense_pass, "input_moments", watched_moments)
    quantize(dense, dense_bits=4, dense_group_size=32, token_weighting=weighting, allow_thin=True)
    for index, found in seen["linear"].items():
        learnt = found > 0  # others are held out
        torch.testing.assert_close(found[learnt], seen["experts"][index][learnt])
        assert float(learnt.float().mean()) > 0.5
    assert seen["linear"].keys() == {0, 1}


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_what_is_found_is_treated_like_the_others_if_keeping_it_is_dear(dense, monkeypatch) -> None:
    """Where its scales would clip it: one of eight experts in 16 bits takes two of eight. With a warning."""
    monkeypatch.setattr(super_expert_policy, "LARGEST_SHARE", 0.1)
    message = (
        r"1 super experts .* in their original precision they would take 2\.000 bits per weight, over 10% of"
    )
    options = {"method": "fast", "allow_thin": True}
    with pytest.warns(UserWarning, match=message):
        found = quantize(dense, **options).config.quantization_config.layers
    without = quantize(dense, super_experts={}, **options).config.quantization_config.layers
    assert found[LAYER]["report"]["super_experts"] == [2]
    assert found == without


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_detection_can_be_overridden(dense) -> None:
    """None, or others than those that are found; what the model lacks is refused by name."""
    manifest = quantize(dense, super_experts={}).config.quantization_config.layers
    assert all("kept_experts" not in layer for layer in manifest.values())
    others = {"model.layers.0.mlp.experts": [3, 0]}  # without it, layer 1 errs by more than it puts out
    manifest = quantize(dense, super_experts=others, allow_thin=True).config.quantization_config
    assert [layer.get("kept_experts") for layer in manifest.layers.values()] == [[0, 3], None]
    for wrong in ({"model.layers.7.mlp.experts": [0]}, {LAYER: [4]}):
        with pytest.raises(QuantizationError, match=next(iter(wrong))):
            quantize(dense, super_experts=wrong)
    with pytest.raises(QuantizationError, match=r"no 0 for their rows"):
        quantize(dense, widths=[2, 4, 8], super_experts="keep")
    with pytest.raises(QuantizationError, match=r"kept_experts take 4\.0000 bits"):
        quantize(dense, super_experts={LAYER: [0, 1]}, bits=4)


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_shards_of_a_layer_with_kept_experts_and_biases_add_up(tiny_model, tmp_path) -> None:
    """Tensor parallel halves add the bias of down once; expert parallel parts keep what they hold."""
    model = tiny_model("gpt_oss", hidden_size=64, intermediate_size=64, layer_types=["full_attention"] * 2)
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "dense")
    name = "model.layers.0.mlp.experts"
    module = quantize(tmp_path / "dense", super_experts={name: [1, 2]}, bits=12).get_submodule(name)
    spec, packed = module.spec, module.packed()
    inputs = torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    wanted = dispatch.prepare(spec, packed, gating("silu")).forward(*inputs)
    rows = [Shard((0, 1, 2, 3), (0, 1)), Shard((0, 1, 2, 3), (1, 2))]
    experts = [Shard((3, 1), (0, 2)), Shard((0, 2), (0, 2))]
    single = [Shard((0, 3), (0, 2)), Shard((2, 1), (0, 2))]
    for shards in (rows, experts, single):
        total = torch.zeros_like(wanted)
        for shard in shards:
            part = slice_packed(packed, spec.widths, spec.shape, shard, spec.kept)
            local = replace(
                spec,
                shape=shard_shape(spec.shape, shard),
                payload_words=part.payload.numel(),
                kept=shard_kept(spec.kept, shard),
            )
            assert {n: (t.dtype, tuple(t.shape)) for n, t in part.tensors()} == local.tensors()
            ids = torch.tensor([shard.experts.index(e) if e in shard.experts else -1 for e in range(4)])
            piece = dispatch.prepare(local, part, gating("silu"))
            total += piece.forward(inputs[0], ids[inputs[1]], inputs[2])
        assert float((total - wanted).norm() / wanted.norm()) < 1e-3  # inputs rounded to 16 bits


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_an_altered_list_of_kept_experts_is_refused(dense, tmp_path) -> None:
    """Another id in config.json would compute another expert with the stored weights."""
    quantize(dense, super_experts="keep").save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    text = file.read_text()
    for wrong in ("[4]", '["2"]', "[2, 2]", "[]", "[1]"):
        before = '"kept_experts": [\n          2\n        ]'
        assert before in text
        file.write_text(text.replace(before, f'"kept_experts": {wrong}'))
        with pytest.raises(CheckpointError):
            AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_gating_of_the_module_is_used(tiny_model) -> None:
    """Guards kept experts of GPT-OSS: their activation is clamped."""
    module = find_moe_layers(tiny_model("gpt_oss"))[0].module
    gate, up = torch.tensor([[100.0]]), torch.tensor([[-100.0]])
    limit = module.limit
    wanted = (1 - limit) * limit * torch.sigmoid(torch.tensor(limit * module.alpha))
    assert float(apply_gating(module, gate, up)) == pytest.approx(float(wanted))


def test_a_super_expert_planted_in_a_trained_model(moe_tiny_path, tmp_path) -> None:
    """A trained expert is given an output of some thousand times the residual stream's median. It must be
    found, the only one, and perplexity must stay near that of the model it was planted in: measured 66.8
    to 62.8 (without a planted expert 51.2 to 50.9: massive tokens make the whole model more sensitive)."""
    from transformers import AutoTokenizer

    from bitsmoe_plugin.commands.evaluate import evaluate_model, evaluation_text

    model = AutoModelForCausalLM.from_pretrained(moe_tiny_path).eval()
    experts = model.get_submodule(LAYER)
    experts.down_proj.data[19, 127] += 2e4 * experts.down_proj.data[19].float().mean(0).bfloat16()
    model.save_pretrained(tmp_path / "planted")
    AutoTokenizer.from_pretrained(moe_tiny_path).save_pretrained(tmp_path / "planted")
    data = moe_tiny_path.parent / "data"
    quick = {"method": "paper-v2", "grid": "trellis", "basis_bits": 4, "joint_basis": True}
    config = BitsMoEConfig(
        bits=4.0,
        dataset=str(data / "calibration.jsonl"),
        calibration_tokens=1024,
        sequence_length=256,
        super_experts="keep",
        **quick,
    )
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "planted", quantization_config=config)
    layers = quantized.config.quantization_config.layers
    assert {name: entry["kept_experts"] for name, entry in layers.items() if "kept_experts" in entry} == {
        LAYER: [19]
    }
    tokenizer = AutoTokenizer.from_pretrained(moe_tiny_path)
    texts = evaluation_text(str(data / "eval.jsonl"), tokenizer, sequence_length=256, max_tokens=2048)
    result = evaluate_model(quantized, texts, reference=model)
    full = evaluate_model(model, texts).perplexity
    assert result.perplexity == pytest.approx(full, rel=0.1)


def test_a_super_expert_that_the_model_rests_on(moe_tiny, moe_tiny_path, tmp_path, monkeypatch) -> None:
    """Planted without changing what the model computes: perplexity is lost with this expert (measured 330
    against 51.6), so it must be found, the only one, and quality be kept. With ``method="fast"`` it keeps its
    weights: Gaussian scales clip it (9 % of perplexity were lost at any widths, 2 % with its weights)."""
    import importlib

    from transformers import AutoTokenizer

    from bitsmoe_plugin.commands.evaluate import EvaluationText, evaluate_model

    monkeypatch.syspath_prepend(moe_tiny_path.parent)
    example = importlib.import_module("plant_super_expert")
    data, tokenizer = moe_tiny_path.parent / "data", AutoTokenizer.from_pretrained(moe_tiny_path)
    tokens = example.sequences(str(data / "calibration.jsonl"), tokenizer, 64)
    text = [EvaluationText("all", example.sequences(str(data / "eval.jsonl"), tokenizer, 8))]
    planted = example.plant(moe_tiny, tokens)
    planted.model.save_pretrained(tmp_path)
    model = example.quantize(tmp_path, tokens[:32], bits=3.0, method="fast")
    layers = model.config.quantization_config.layers
    kept = {name: entry["kept_experts"] for name, entry in layers.items() if "kept_experts" in entry}
    assert kept == {planted.layer: [planted.expert]}
    full, packed = (evaluate_model(each, text).perplexity for each in (planted.model, model))
    assert evaluate_model(example.without_expert(planted, planted.expert), text).perplexity > 3 * full
    assert packed < 1.05 * full
