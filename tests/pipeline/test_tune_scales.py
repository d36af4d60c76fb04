"""Tuning of basis scales: gradients, what changes and what does not, what is refused."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, ConfigError, QuantizationError
from bitsmoe_plugin.calibration.blocks import held_out_last
from bitsmoe_plugin.commands.evaluate import EvaluationText, evaluate_model
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.pipeline import tune_scales
from bitsmoe_plugin.pipeline.tunable_layer import TunableLayer
from bitsmoe_plugin.pipeline.tune_scales import tune
from bitsmoe_plugin.pipeline.tuning_settings import LEARNABLE, TuningSettings
from bitsmoe_plugin.runtime.experts import BitsMoEExperts
from bitsmoe_plugin.runtime.with_originals import WithOriginals

TEXT = str(Path(__file__).parents[2] / "examples" / "data" / "calibration.jsonl")
FIRST = "model.layers.0.mlp.experts"


def routed(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, expert ids and weights for a layer of the bundled model."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 128, generator=generator)
    score, index = torch.rand(tokens, 48, generator=generator).softmax(-1).topk(4)
    return hidden, index, score


def test_without_gains_it_computes_what_the_module_computes(packed: Any) -> None:
    module = packed.get_submodule(FIRST)
    inputs = routed(9)
    torch.testing.assert_close(TunableLayer(module).forward(*inputs), module(*inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_are_those_of_differences(packed: Any, which: int) -> None:
    """Of the output's projection on a fixed direction, by every gain of one row of the basis."""
    layer, inputs = TunableLayer(packed.get_submodule(FIRST)), routed(5, seed=1)
    direction = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))

    def projection() -> Tensor:
        return (layer.forward(*inputs).double() * direction).sum()

    projection().backward()
    gain = layer.bases[which]
    found, step = gain.grad[100], 0.02  # the strongest rows come last
    for group in range(gain.shape[1]):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                gain[100, group] = sign * step
                ends.append(float(projection()))
                gain[100, group] = 0
        assert float(found[group]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02, abs=1e-5)
    assert float(found.abs().max()) > 1e-4


def test_rows_are_learnt_as_they_are_stored(packed: Any) -> None:
    """Scale codes move by whole steps and stay in their grid, widths stay, and what was computed with gains
    is what the tensors with them compute."""
    module, inputs = copy.deepcopy(packed.get_submodule(FIRST)), routed(9, seed=3)
    layer = TunableLayer(module)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for gain in layer.gains:
            gain.copy_(0.5 * torch.randn(gain.shape, generator=generator))
        layer.rows[:, 0] = 20.0  # beyond every grid
        found = layer.forward(*inputs)
    before, tuned = module.packed().row_codes, layer.tuned()
    assert torch.equal(before // 32, tuned.row_codes // 32)
    used = before // 32 > 0
    steps = module.packed().scale_grid.view(torch.float16)[:, 1].float()
    assert bool((tuned.row_codes % 32 == 31)[:, 0][used[:, 0] & (steps > 1e-3)].all())
    assert torch.equal(tuned.row_codes[~used], before[~used])
    assert 0.2 < float((tuned.row_codes != before)[used].float().mean()) < 1
    module.load_packed(tuned)
    again = TunableLayer(module).forward(*inputs)
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-4)


def test_gradients_of_rows_are_those_of_scales(packed: Any) -> None:
    """Of the output's projection on a fixed direction, times exp(gain) for exp2(step) of a code."""
    module, inputs = copy.deepcopy(packed.get_submodule(FIRST)), routed(5, seed=1)
    layer, direction = TunableLayer(module), torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    (layer.forward(*inputs).double() * direction).sum().backward()
    gradient, steps = layer.rows.grad, layer._steps().expand_as(layer.rows)
    ratio = 0.5 * (torch.exp2(steps) - torch.exp2(-steps))
    codes = module.packed().row_codes % 32
    inside = (codes > 0) & (codes < 31) & (steps > 1e-3) & (steps < 0.2)
    place = int(torch.where(inside, gradient.abs(), 0).argmax())
    ends = []
    for sign in (1, -1):
        moved = module.packed().row_codes.clone().flatten()
        moved[place] += sign
        other = copy.deepcopy(module)
        other.load_packed(replace(module.packed(), row_codes=moved.view_as(codes)))
        out = TunableLayer(other).forward(*inputs).detach().double()
        ends.append(float((out * direction).sum()))
    assert float(gradient.flatten()[place]) == pytest.approx(
        (ends[0] - ends[1]) / (2 * float(ratio.flatten()[place])), rel=0.03
    )


def test_hidden_states_and_router_get_their_gradients(packed: Any) -> None:
    """Earlier layers learn through later ones."""
    hidden, index, weights = routed(5)
    hidden.requires_grad_(True)
    weights.requires_grad_(True)
    TunableLayer(packed.get_submodule(FIRST)).forward(hidden, index, weights).square().sum().backward()
    assert float(hidden.grad.abs().min(-1).values.max()) > 0
    assert float(weights.grad.abs().min()) > 0


def test_tuning_comes_closer_and_says_how_much(packed: Any, moe_tiny: Any, blocks: Tensor) -> None:
    """On blocks that it did not learn from, as ``evaluate`` measures them; twice the same."""
    settings = TuningSettings(epochs=2, batch_size=4, held_out=0.25, learning_rate=5e-3)
    model, again = copy.deepcopy(packed), copy.deepcopy(packed)
    result = tune(model, moe_tiny, blocks, settings)
    ordered, seen = held_out_last(blocks, 0.25)
    texts = [EvaluationText("held out", ordered[seen:])]
    before, after = (evaluate_model(m, texts, reference=moe_tiny).kl_divergence for m in (packed, model))
    assert result.tokens == 12 * 48
    assert result.epoch in (1, 2)
    assert after < 0.97 * before
    # The last token of a block is predicted here and not scored there.
    assert result.before == pytest.approx(before, rel=0.05)
    assert result.after == pytest.approx(after, rel=0.05)
    assert tune(again, moe_tiny, blocks, settings) == result
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())


CHANGES = {
    "bases": {"bitsmoe_input_scales", "bitsmoe_output_scales"},
    "rows": {"bitsmoe_row_codes"},
    "norms": {
        f"{n}norm.weight" for n in ("input_layer", "post_attention_layer", "self_attn.q_", "self_attn.k_", "")
    },
    "routers": {"mlp.gate.weight"},
}
"""What is learnt -> tensors that change in every decoder layer, or once."""


@pytest.mark.parametrize("learn", [("bases",), ("rows",), ("norms",), ("routers",)])
def test_it_changes_what_is_learnt_alone(
    packed: Any, moe_tiny: Any, blocks: Tensor, learn: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the config that others may hold, nothing. Ends are said to be ever better."""
    ends = iter((3.0, 2.0))
    monkeypatch.setattr(tune_scales, "_held_out", lambda *_: next(ends))
    model = copy.deepcopy(packed)
    held = model.config.quantization_config
    assert held.to_dict() == packed.config.quantization_config.to_dict()
    tune(
        model,
        moe_tiny,
        blocks[:8],
        TuningSettings(1, learn=learn, learning_rate=0.5, batch_size=7, held_out=0.2),
    )
    old, new = packed.state_dict(), model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    wanted = {name for name in old for ending in CHANGES[learn[0]] if name.endswith(ending)}
    assert changed == wanted
    assert len(changed) == {"bases": 8, "rows": 4, "norms": 17, "routers": 4}[learn[0]]
    assert held.to_dict() == packed.config.quantization_config.to_dict()
    noted = model.config.quantization_config
    assert noted.calibration["tuning"]["epoch"] == 1
    assert noted.calibration["tuning"]["learnt"] == list(learn)
    other = learn[0] in ("bases", "rows")
    assert all(
        (noted.layers[name]["sha256"] != entry["sha256"]) == other for name, entry in held.layers.items()
    )
    assert all(old[name].shape == new[name].shape and old[name].dtype == new[name].dtype for name in old)


@pytest.mark.parametrize("epoch", [0, 1])
def test_stopped_it_keeps_what_it_has(
    packed: Any, moe_tiny: Any, blocks: Tensor, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """Ctrl-C where an epoch's end would be measured."""
    measured, ends = tune_scales._held_out, iter(range(1, 9))

    def stopped(*args: Any) -> float:
        if next(ends) == epoch + 2:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(tune_scales, "_held_out", stopped)
    model, settings = (
        copy.deepcopy(packed),
        TuningSettings(3, learn=LEARNABLE, learning_rate=5e-3, batch_size=8),
    )
    if epoch == 0:
        with pytest.raises(KeyboardInterrupt):
            tune(model, moe_tiny, blocks, settings)
    else:
        with pytest.warns(UserWarning, match="learnt until epoch 1 is kept"):
            assert tune(model, moe_tiny, blocks, settings).epoch == 1
    old, new = packed.state_dict(), model.state_dict()
    for name in (f"{FIRST}.bitsmoe_input_scales", "model.norm.weight", "model.layers.0.mlp.gate.weight"):
        assert torch.equal(old[name], new[name]) == (epoch == 0), name


def test_a_rate_that_ruins_the_model_is_not_taken(packed: Any, moe_tiny: Any, blocks: Tensor) -> None:
    model = copy.deepcopy(packed)
    settings = TuningSettings(epochs=1, learn=LEARNABLE, learning_rate=1.0, batch_size=5)
    result = tune(model, moe_tiny, blocks, settings)
    assert (result.epoch, result.after) == (0, result.before)
    old, new = packed.state_dict(), model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert "tuning" not in model.config.quantization_config.calibration


def test_kept_experts_pass_gradients_on(moe_tiny_path: Path, moe_tiny: Any, blocks: Tensor) -> None:
    config = BitsMoEConfig(
        bits=3.0, dataset=blocks.tolist(), sequence_length=48, method="fast", super_experts={FIRST: [0, 1]}
    )
    model = AutoModelForCausalLM.from_pretrained(moe_tiny_path, quantization_config=config)
    module = model.get_submodule(FIRST)
    assert module.spec.kept == (0, 1)
    layer = TunableLayer(module)
    hidden, index, weights = routed(6)
    index[:, 0] = 1
    hidden.requires_grad_(True)
    whole = WithOriginals(layer, module.spec, module.gating)
    assert not whole.forward(hidden, index, weights).requires_grad
    whole.compute(hidden, index, weights).square().sum().backward()
    both = hidden.grad.clone()
    hidden.grad = None
    layer.forward(hidden, index, weights).square().sum().backward()
    assert float((both - hidden.grad).norm() / both.norm()) > 0.01
    result = tune(model, moe_tiny, blocks, TuningSettings(epochs=2, learning_rate=2e-3))
    assert result.after < result.before


def test_what_cannot_be_tuned_is_refused(packed: Any, moe_tiny: Any, blocks: Tensor) -> None:
    with pytest.raises(QuantizationError, match="no packed experts"):
        tune(moe_tiny, moe_tiny, blocks, TuningSettings())
    with pytest.raises(QuantizationError, match=r"15 blocks .* at least 16"):
        tune(packed, moe_tiny, blocks[:15], TuningSettings())
    broken = copy.deepcopy(moe_tiny)
    with torch.no_grad():
        broken.lm_head.weight.mul_(float("nan"))
    with pytest.raises(QuantizationError, match="not finite"):
        tune(packed, broken, blocks, TuningSettings())
    assert all(m._runtime is None for m in packed.modules() if isinstance(m, BitsMoEExperts))


def test_bases_without_scales_are_refused(moe_tiny_path: Path, moe_tiny: Any, blocks: Tensor) -> None:
    config = BitsMoEConfig(
        bits=4.0, dataset=blocks.tolist(), sequence_length=48, method="fast", basis_bits=16
    )
    model = AutoModelForCausalLM.from_pretrained(moe_tiny_path, quantization_config=config)
    with pytest.raises(QuantizationError, match="basis_bits=16 have no scales"):
        tune(model, moe_tiny, blocks, TuningSettings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"learning_rate": 0},
        {"batch_size": 1.5},
        {"held_out": 0},
        {"seed": -1},
        {"through": "layer"},
        {"layers_at_once": 0},
        {"learn": ("experts",)},
        {"learn": ()},
        {"learn": "rows"},
        {"learn": ("rows", "rows")},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"TuningSettings: {next(iter(wrong))}="):
        TuningSettings(**wrong)


def test_the_command_writes_a_checkpoint_of_the_same_size(
    packed_small: Path, small_moe_tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    given = ["tune", str(packed_small), str(out), "--reference", str(small_moe_tiny), "--dataset", TEXT]
    size = ["--calibration-tokens", "1024", "--sequence-length", "64", "--epochs", "1"]
    status, _, printed = run_here(capfd, *given, *size)
    assert status == 0, printed
    assert "after epoch 1" in printed
    loaded = AutoModelForCausalLM.from_pretrained(out)  # checks the hash of every layer
    assert loaded.config.quantization_config.calibration["tuning"]["tokens"] == 15 * 64
    before, after = inspect_checkpoint(packed_small), inspect_checkpoint(out)
    assert before["bits_per_weight"] == after["bits_per_weight"]
    old, new = (load_file(path / "model.safetensors") for path in (packed_small, out))
    changed = {name.rsplit(".", 1)[-1] for name in old if not torch.equal(old[name], new[name])}
    assert changed == CHANGES["bases"] | CHANGES["rows"]
    card = (out / "README.md").read_text()
    assert re.search(r"Tuned .*through the whole model \(bases, rows\) on 960 tokens: KL", card)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    assert run_here(capfd, *given, *size)[0] == 2  # it exists


def test_nothing_is_written_if_nothing_came_closer(
    packed_small: Path, small_moe_tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in Path(TEXT).read_text().split("\n")[:9]))
    status, _, printed = run_here(
        capfd, "tune", str(packed_small), str(tmp_path / "out"), "--reference", str(small_moe_tiny),
        "--dataset", str(text), "--calibration-tokens", "512", "--sequence-length", "32", "--epochs", "1",
        "--learning-rate", "1", "--through", "layers",
    )  # fmt: skip
    assert status == 2
    assert "nothing was written; give more text" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]
