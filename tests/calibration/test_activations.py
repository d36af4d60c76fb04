"""Samples of an expert's tokens, and what is computed from them, against all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.calibration import activations, statistics
from bitsmoe_plugin.calibration.activations import ExpertTokens, drawn_by_weight, expert_tokens
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.pipeline.layer_plan import plan_layer
from bitsmoe_plugin.rounding import refit_down
from bitsmoe_plugin.rounding.layer_rounding import round_experts, round_layer
from bitsmoe_plugin.spectral import layer_feedback, moments, statistics_tokens
from bitsmoe_plugin.spectral.layer_problem import build_problem

E, SIZE, H, T, K = 6, 40, 64, 3000, 2


@pytest.fixture(scope="module")
def layer(make_layer):
    return make_layer(E, SIZE, H, T, K)


def effective(weights: Tensor) -> float:
    """Tokens of equal weight that tell as much."""
    return float(weights.sum() ** 2 / weights.square().sum())


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("certain", [[], [3, 500, 7]])
def test_samples_weigh_as_much_and_are_not_biased(spread: float, certain: list[int]) -> None:
    """Guards against a sum over a sample that is another one than over all, on average over many samples,
    and against losing the few tokens that count."""
    generator = torch.Generator().manual_seed(1)
    weights = (spread * torch.randn(1000, generator=generator)).exp()
    values = torch.randn(1000, generator=generator)
    sums = []
    for seed in range(300):
        positions, raised = drawn_by_weight(weights, 100, seed, torch.tensor(certain, dtype=torch.long))
        assert len(positions) <= 100
        assert bool((positions.diff() > 0).all())
        assert set(certain) <= set(positions.tolist())
        assert float(raised.sum()) == pytest.approx(float(weights.sum()), rel=0.02)
        sums.append((raised * values[positions]).sum())
    found = torch.stack(sums)
    off = float(found.mean() - (weights * values).sum())
    assert abs(off) < 4 * float(found.std()) / 300**0.5 + 1e-5
    if not certain:
        assert effective(raised) > 0.95 * min(100, effective(weights))


def test_tokens_without_weight_can_be_sampled() -> None:
    """Guards against a division by zero where a router gives weights of 0."""
    positions, raised = drawn_by_weight(torch.zeros(50), 10, 0)
    assert len(positions) <= 10
    assert bool((raised == 0).all())


def test_a_sample_keeps_order_slots_and_the_loudest(layer) -> None:
    """Routed ones come first, in rising order, each with its slot; those of the largest streams are in."""
    acts = layer.activations
    for own in expert_tokens(acts, E, seed=0, all_tokens=True):
        some = own.sampled(160, acts.token_weights, seed=3)
        assert (some.routed, len(some.tokens)) <= (160, 320)
        routed = some.tokens[: some.routed]
        assert bool((routed.diff() > 0).all())
        index = {int(t): int(s) for t, s in zip(own.tokens, own.slots, strict=False)}
        assert [index[int(t)] for t in routed] == some.slots.tolist()
        loud = own.tokens[: own.routed][acts.token_weights[own.tokens[: own.routed]].argsort()[:10]]
        assert set(loud.tolist()) <= set(routed.tolist())
        for part in (slice(some.routed), slice(some.routed, None)):
            whole = own.weights[: own.routed] if part.start is None else own.weights[own.routed :]
            assert float(some.weights[part].sum()) == pytest.approx(float(whole.sum()), rel=0.02)
    assert own.sampled(T, acts.token_weights, 0) is own


def test_an_extreme_output_is_found_in_a_sample(layer) -> None:
    """A super expert shows itself at one token in thousands, whose residual stream is huge."""
    hidden = layer.activations.hidden.clone()
    token = int(layer.activations.top_k_index[:, 0].eq(2).nonzero()[-7])
    hidden[token] *= 1e3
    omega = layer.activations.token_weights.clone()
    omega[token] = 1e-6
    acts = replace(layer.activations, hidden=hidden, token_weights=omega)
    tokens = expert_tokens(acts, E, seed=0)
    some = [own.sampled(64, omega, seed=0) for own in tokens]
    peaks = [
        statistics.collect(layer.weights, acts, tokens, layer.gating, sampled=sample).output_peaks
        for sample in (tokens, some)
    ]
    assert float(peaks[1][2]) == pytest.approx(float(peaks[0][2]), rel=1e-5)
    assert float(peaks[0][2]) > 100 * float(peaks[0].median())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few tokens as possible are looked at: 320 of 1,000 of an expert."""
    monkeypatch.setattr(activations, "FEWEST_SAMPLED", 0)
    monkeypatch.setattr(statistics_tokens, "FEWEST_MOMENT_TOKENS", 0)
    monkeypatch.setattr(statistics_tokens, "MEAN_TOKENS", 200)
    monkeypatch.setattr(moments, "COVARIANCE_TOKENS", 5)
    monkeypatch.setattr(layer_feedback, "COVARIANCE_TOKENS", 5)
    monkeypatch.setattr(layer_feedback, "IMPORTANCE_NEURONS", 10)


def test_a_layer_from_samples_is_as_good(layer, few, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs and the layer's errors, of a run that samples and one that does not: a weight that is lost or
    counted twice would be off by more than the 320 tokens' chance."""

    def result(**options) -> tuple[Tensor, Tensor]:
        config = BitsMoEConfig(bits=3, **options)
        given = layer.weights, layer.activations, layer.gating, config
        plan = plan_layer(build_problem("layer", *given), 3 * E * SIZE * H * 3)
        second = build_problem("layer", *given, bases=plan.bases)
        return plan.costs, round_layer(second, torch.full((3, E, H), 3)).errors

    for options in ({}, {"feedback": False}, {"joint_basis": False}, {"refit": False}):
        sampled = result(**options)
        with monkeypatch.context() as patch:
            patch.setattr(activations, "FEWEST_SAMPLED", T)
            patch.setattr(statistics_tokens, "FEWEST_MOMENT_TOKENS", T)
            patch.setattr(statistics_tokens, "MEAN_TOKENS", T)
            whole = result(**options)
        for one, other in zip(sampled, whole, strict=True):
            assert float((one.sum() / other.sum()).log().abs()) < 0.15, options
            assert not torch.equal(one, other)


def test_what_tells_how_much_tokens_matter(layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some neurons tell the same as all, but for noise; all tell exactly what the statistics do."""
    problem = build_problem("layer", layer.weights, layer.activations, layer.gating, BitsMoEConfig(bits=3))
    known = problem.tokens[1].of_slots(problem.statistics.slot_weights)
    torch.testing.assert_close(layer_feedback.slot_weights(problem, 1), known)
    monkeypatch.setattr(layer_feedback, "IMPORTANCE_NEURONS", 10)
    some = layer_feedback.slot_weights(problem, 1)
    both = torch.stack([some / some.sum(1, keepdim=True), known / known.sum(1, keepdim=True)])
    assert not torch.equal(both[0], both[1])
    assert float(torch.corrcoef(both[:, 0])[0, 1]) > 0.7


def test_a_trial_of_some_tokens_measures_the_same(layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a third of them, within chance."""
    problem = build_problem("layer", layer.weights, layer.activations, layer.gating, BitsMoEConfig(bits=3))
    experts = [0, 2, 4]
    rounded, _ = round_experts(problem, torch.full((3, 3, H), 2), experts, with_values=True)
    whole = refit_down.sampled_error(problem, experts, rounded.values)
    monkeypatch.setattr(refit_down, "TRIAL_TOKENS", T * K // E // 3)
    some = refit_down.sampled_error(problem, experts, rounded.values)
    assert some != whole
    assert some == pytest.approx(whole, rel=0.15)


def test_tokens_within_a_choice(layer) -> None:
    own = expert_tokens(layer.activations, E, seed=0, all_tokens=True)[1]
    chosen = torch.arange(T) % 3 == 0
    kept: ExpertTokens = own.within(chosen)
    assert bool((kept.tokens % 3 == 0).all())
    assert kept.routed == int((own.tokens[: own.routed] % 3 == 0).sum())
    assert torch.equal(
        kept.of_slots(layer.activations.top_k_index), torch.full((kept.routed,), 1, dtype=torch.long)
    )
